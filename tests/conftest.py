"""What every test runs under: one thread, no network, GPU tests only where there is a GPU, slow tests last."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from goals import Ledger, Trials

# before any parallel operation: ranks forked from a process whose OpenMP pool has started would hang
torch.set_num_threads(1)

TESTS = Path(__file__).parent


LEDGER = pytest.StashKey[Ledger]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trials of the goals of reliability")
    group.addoption("--nightly", action="store_true", help="the larger numbers of trials")
    group.addoption("--fault-seed", type=int, default=0, help="where and when faults strike (default: 0)")
    group.addoption("--first-trial", type=int, default=0, help="begin at this one, to repeat one that failed")
    group.addoption("--goals-json", type=Path, help="write what was done for each goal to this file")


def pytest_configure(config: pytest.Config) -> None:
    """The same for the processes that tests start."""
    wanted = config.option
    config.stash[LEDGER] = Ledger(wanted.nightly, wanted.fault_seed, wanted.first_trial)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"


def runs_late(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None or item.path.is_relative_to(TESTS / "end_to_end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=runs_late)  # stable: the order within each half stays


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call":
        item.call_report = report  # type: ignore[attr-defined]
    return report


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    """The trials that the test's `goal` marker asks for; a test that does fewer fails."""
    ledger, node = request.config.stash[LEDGER], request.node
    found, started = ledger.trials_of(node), time.monotonic()
    yield found
    ledger.close(node, found, started)
    path = request.config.option.goals_json
    if path is not None:
        ledger.write(path)  # a long run may be ended at any time
    report = getattr(node, "call_report", None)
    if report is not None and report.failed:
        print(found.said)
    assert report is None or not report.passed or found.done >= found.wanted, found.said

