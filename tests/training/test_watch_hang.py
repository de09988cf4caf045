"""Ranks that make no progress are found, named with the stacks of all, and ended; nothing stays behind."""

import statistics
import time
from pathlib import Path

import pytest
from goals import Trials

from tests.training.watched_ranks import HANGS, Plan, start

HANG_S = 1.0
# a line of the culprit's stack, or of the others', that tells what it does
TELLING = {
    "stopped": "in <lambda>",
    "sleeping": "in <lambda>",
    "spinning": "in spin",
    "holding the interpreter": "in hold_interpreter",
    "in a catastrophic pattern": "in catastrophic_pattern",
    "waiting for its loader": "in wait_for_loader",
    "skipping a barrier": "in skip_barrier",
}


@pytest.mark.timeout(3600)
@pytest.mark.goal(
    "R19",
    ci=7,
    nightly=140,
    what="a rank of 3 hangs in one of 7 ways: the report names it, with the stacks of all; exit code 87, no orphan",
)
def test_a_hung_rank_is_named_and_all_are_ended(trials: Trials, tmp_path: Path) -> None:
    took = []
    for number, rng in trials:
        kind = list(HANGS)[number % len(HANGS)]
        culprit = rng.randrange(3)
        plan = Plan(3, culprit, at_step=3, trouble=HANGS[kind], hang_s=HANG_S)
        ranks = start(plan, tmp_path / str(number))
        ranks.await_step()
        struck = time.monotonic()
        ranks.await_end([0, 1, 2])
        took.append(max(ranks.ended_at.values()) - struck - HANG_S)
        report = (ranks.folder / "hang.txt").read_text()
        assert report in ranks.said(0), "the report is on the first rank's stderr too"
        first = report.splitlines()[0]
        assert first.startswith(f"megatron_moe: rank {culprit} (host "), report
        assert f"pid {ranks.pids[culprit]}) hangs" in first, report
        assert "no progress for " in first and "in step 4, section 'data'" in first
        for rank in range(3):
            assert f"--- rank {rank} (host " in report
            # who holds the interpreter cannot end by itself; one that sleeps in C is woken by the signal for its stack
            held = rank == culprit and kind == "in a catastrophic pattern"
            assert ranks.codes[rank] in ((-9,) if held else (87, -9)), (kind, rank, ranks.codes)
        assert TELLING[kind] in report, report
        assert report.count("in _steps") == 3, report
        if kind == "stopped":
            assert "its process was stopped by a signal (state T)" in report
        assert ranks.orphans() == []
    trials.notes["median after the timeout until all ended (s)"] = round(statistics.median(took), 3)
    trials.notes["longest (s)"] = round(max(took), 3)
    # the bar is two seconds; the machine of the test may be busy
    assert statistics.median(took) < 10.0


@pytest.mark.timeout(3600)
@pytest.mark.goal("R19", ci=200, nightly=20000, what="steps of uneven ranks under a hang timeout of 6 s: no alarm")
def test_there_is_no_false_alarm(trials: Trials, tmp_path: Path) -> None:
    plan = Plan(3, 1, at_step=0, num_steps=trials.wanted, slow_s=0.002, hang_s=6.0, straggler_factor=5.0)
    ranks = start(plan, tmp_path / "clean")
    ranks.await_end([0, 1, 2], after_s=0.05 * trials.wanted)
    assert [ranks.codes[rank] for rank in range(3)] == [0, 0, 0], ranks.said(0)
    assert not (ranks.folder / "hang.txt").exists()
    assert "megatron_moe" not in "".join(ranks.said(rank) for rank in range(3))
    assert ranks.orphans() == []
    trials.add(trials.wanted)


def test_a_rank_that_computes_more_slowly_is_told_of(tmp_path: Path) -> None:
    plan = Plan(3, 2, at_step=0, num_steps=70, step_s=0.02, slow_s=0.02, straggler_factor=1.2)
    ranks = start(plan, tmp_path / "slow")
    ranks.await_end([0, 1, 2])
    said = ranks.said(0)
    assert "rank 2 (host " in said and "is slow: " in said, said
