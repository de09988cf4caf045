"""What every test runs under: one thread, no network, GPU tests only where there is a GPU, slow tests last."""

import os
from pathlib import Path

import pytest
import torch

# before any parallel operation: ranks forked from a process whose OpenMP pool has started would hang
torch.set_num_threads(1)

TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """The same for the processes that tests start."""
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
