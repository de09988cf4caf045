"""How trials are counted: a goal that was tried less often than wanted, or failed, is told as such."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from goals import Ledger, Trials

from tests.faults.table import table


def node(name: str, *, passed: bool = True, goal: str = "R1", ci: int = 2, nightly: int = 5) -> Any:
    """As much of a test as the ledger reads."""
    marker = pytest.mark.goal(goal, ci=ci, nightly=nightly, what="something").mark
    report = SimpleNamespace(passed=passed)
    return SimpleNamespace(nodeid=name, get_closest_marker=lambda kind: marker, call_report=report)


def closed(ledger: Ledger, test: Any, done: int) -> Trials:
    trials = ledger.trials_of(test)
    trials.add(done)
    ledger.close(test, trials, time.monotonic())
    return trials


def test_the_night_wants_more_and_each_trial_has_its_own_numbers() -> None:
    day, night = (Ledger(nightly, seed=3, first=7).trials_of(node("a")) for nightly in (False, True))
    assert (day.wanted, night.wanted) == (2, 5)
    drawn = [(number, rng.random()) for number, rng in night]
    assert [number for number, _ in drawn] == [7, 8, 9, 10, 11] and len({value for _, value in drawn}) == 5
    assert drawn[:2] == [(number, rng.random()) for number, rng in day]
    assert day.done == 2 and night.done == 5


def test_a_trial_that_raises_is_not_counted_and_can_be_done_again() -> None:
    trials = Ledger(False, seed=3, first=0).trials_of(node("a"))
    with pytest.raises(ZeroDivisionError):
        for number, _ in trials:
            1 // (1 - number)
    assert trials.done == 1
    assert trials.said.endswith("again from there with --fault-seed 3 --first-trial 1")


def test_too_few_trials_and_failures_are_told(tmp_path: Path) -> None:
    ledger = Ledger(False, seed=0, first=0)
    closed(ledger, node("a[x]"), 2)
    closed(ledger, node("a[y]"), 2)
    closed(ledger, node("b", goal="R10"), 1)
    closed(ledger, node("c", goal="R2", passed=False), 2)
    ledger.write(tmp_path / "goals.json")
    found = json.loads((tmp_path / "goals.json").read_text())
    assert [(row["goal"], row["test"], row["done"], row["passed"]) for row in found["rows"]] == [
        ("R1", "a", 4, True),
        ("R2", "c", 2, False),
        ("R10", "b", 1, False),
    ]
    assert found["date"] and "commit" in found and found["versions"]["torch"] == torch.__version__
    one, other = ({**found, "rows": found["rows"][part]} for part in (slice(1, None), slice(1)))
    assert table(one, other) == table(found)
    lines = table(found).splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == ["4", "**2 of 2: failed**", "**1 of 2: failed**"]
