"""Trials of the goals of reliability: how many are wanted, how many were done, from which seed.

    @pytest.mark.goal("R1", ci=50, nightly=1000, what="one of 4 ranks killed at a random step: the same final state")
    def test_...(trials: Trials) -> None:
        for number, rng in trials:
            ...
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest

from megatron_moe.config.whole_file import write_whole
from tests.faults.conditions import conditions


@dataclass
class Trials:
    """Iterating gives (number, random numbers of that trial) `wanted` times and counts those that came to their end.

    Where the number follows from the thing itself (every bit of a file), `add` counts instead.
    """

    goal: str
    what: str
    wanted: int
    seed: int
    first: int = 0  # number of the first trial: another than 0 repeats one that failed
    done: int = 0
    notes: dict[str, float] = field(default_factory=dict)  # other figures of the goal, by name and unit: "restart (s)"

    def __iter__(self) -> Iterator[tuple[int, random.Random]]:
        for number in range(self.first, self.first + self.wanted):
            yield number, random.Random(f"{self.seed} {self.goal} {self.what} {number}")
            self.done += 1

    def add(self, done: int) -> None:
        """So many more trials came to their end."""
        self.done += done

    @property
    def said(self) -> str:
        """How far they came, and how the one that failed is done again."""
        again = f"--fault-seed {self.seed} --first-trial {self.first + self.done}"
        return f"{self.goal}: {self.done} of {self.wanted} trials; again from there with {again}"


@dataclass
class Row:
    """What one test did for a goal."""

    goal: str
    what: str
    test: str
    wanted: int
    done: int
    passed: bool
    seconds: float
    notes: dict[str, float]


@dataclass
class Ledger:
    """All trials of one run of pytest."""

    nightly: bool
    seed: int
    first: int
    rows: list[Row] = field(default_factory=list)

    def trials_of(self, node: pytest.Item) -> Trials:
        """What is asked of a test by its `goal` marker: (id, ci, nightly, what)."""
        marker = node.get_closest_marker("goal")
        if marker is None:
            raise pytest.UsageError(f"{node.nodeid} counts trials but has no goal marker")
        wanted = marker.kwargs["nightly" if self.nightly else "ci"]
        return Trials(marker.args[0], marker.kwargs["what"], wanted, self.seed, self.first)

    def close(self, node: pytest.Item, trials: Trials, started: float) -> None:
        report = getattr(node, "call_report", None)
        passed = report is not None and report.passed and trials.done >= trials.wanted
        seconds = round(time.monotonic() - started, 2)
        found = Row(trials.goal, trials.what, node.nodeid, trials.wanted, trials.done, passed, seconds, trials.notes)
        self.rows.append(found)

    def merged(self) -> list[Row]:
        """One row for all cases of a test, in the order of the goals."""
        found: dict[tuple[str, str, str], Row] = {}
        for row in self.rows:
            test = row.test.partition("[")[0]
            known = found.get((row.goal, row.what, test))
            if known is None:
                found[row.goal, row.what, test] = replace(row, test=test)
                continue
            known.wanted += row.wanted
            known.done += row.done
            known.passed &= row.passed
            known.seconds = round(known.seconds + row.seconds, 2)
            known.notes |= row.notes
        return sorted(found.values(), key=lambda row: (int(row.goal[1:]), row.test))

    def write(self, path: Path) -> None:
        """What is known so far."""
        told = {"nightly": self.nightly, "seed": self.seed, **conditions()}
        text = json.dumps(told | {"rows": [asdict(row) for row in self.merged()]}, indent=1)
        write_whole(path, text + "\n")
