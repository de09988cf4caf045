"""kill -9 of any rank at any time: started again, the run ends as if nothing had happened."""

import statistics
from pathlib import Path

import pytest
from goals import Trials

from tests.end_to_end.tiny_job import Step, write_corpus
from tests.faults.runs import JOBS, STEPS, WORLD, Run, draw_kill, tiny

KILLS = 10  # of one run, each a step further: killed without a cap, it would not get anywhere


@pytest.mark.goal(
    "R1",
    ci=50,
    nightly=1000,
    what="kill -9 of one of 4 ranks at a random step, ZeRO on and off, TP 2 x EP 2: the run ends bit-identical",
)
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_killed_rank_costs_nothing_but_time(trials: Trials, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "tokens")
    expected: dict[str, list[Step]] = {}
    waits: list[float] = []
    run: Run | None = None
    name = ""
    for number, rng in trials:
        if run is None:
            folder = tmp_path / str(number)
            name = list(JOBS)[number // KILLS % len(JOBS)]
            run = Run(folder, tiny(corpus, folder / "saved", name))
        if name not in expected:
            expected[name] = undisturbed(corpus, tmp_path, name)
        step = number % KILLS + rng.randint(1, 2)
        if rng.random() < 0.4:
            run.kill_after(rng.randrange(WORLD), min(step, STEPS - 2), rng.uniform(0, 0.02))
        else:
            run.kill_at(draw_kill(rng, step))
        if number % KILLS == KILLS - 1 or number == trials.first + trials.wanted - 1:
            run.finish()
            run.check(expected[name])
            waits += run.restart_s
            run = None
    trials.notes["median from a kill to the next step (s)"] = round(statistics.median(waits), 2)
    trials.notes["longest (s)"] = round(max(waits), 2)


def undisturbed(corpus: Path, folder: Path, name: str) -> list[Step]:
    whole = Run(folder / f"whole {name}", tiny(corpus, folder / f"whole {name}" / "saved", name))
    whole.finish()
    steps = whole.steps()
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    return steps
