"""The checkpoint benchmark runs, and its ratios are of the same round. No timing is asserted."""

import json
from pathlib import Path

import pytest

from tools.benchmark.checkpoint import RATIOS, main, slowest, summary


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_runs_small_and_writes_every_ratio(tmp_path: Path, ranks: int) -> None:
    output = tmp_path / "found.json"
    given = ["--megabytes", "1", "--ranks", str(ranks), "--tensors", "many", "--rounds", "1", "--folder", str(tmp_path)]
    assert main([*given, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    (case,) = found["cases"]
    assert set(case["ratios"]) == set(RATIOS)
    assert all(ratio["lowest"] > 0 for ratio in case["ratios"].values())
    assert (case["ranks"], case["tensors"], len(case["rounds"])) == (ranks, "many", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_the_slowest_rank_counts_and_ratios_are_of_one_round() -> None:
    one = [{"stall": 1.0, "copy": 1.0}, {"stall": 9.0, "copy": 3.0}]
    two = [{"stall": 2.0, "copy": 0.5}, {"stall": 3.0, "copy": 1.0}]
    rounds = slowest([one, two])
    assert rounds == [{"stall": 2.0, "copy": 1.0}, {"stall": 9.0, "copy": 3.0}]
    found = summary(rounds, 10**9)
    assert found["ratios"] == {"stall / copy": {"median": 2.5, "lowest": 2.0, "highest": 3.0}}
    assert found["gb_per_s"]["copy"] == 0.5
