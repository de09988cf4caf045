"""A short soak, and the marks by which a long one is judged."""

from pathlib import Path
from random import Random

import pytest
from goals import Trials

from tests.faults.mix import WEIGHTS, faults
from tests.faults.slope import Growth
from tests.faults.soak import Soak, soak
from tests.faults.table import soak_table

EVERY_S = 2.0


@pytest.mark.goal(
    "R42",
    ci=6,
    nightly=60,
    what="a job on 4 ranks under kills, hangs, errors, bad disks, flipped bits, preemption: as undisturbed, no leaks",
)
@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_a_short_soak(trials: Trials, tmp_path: Path) -> None:
    found = soak(Soak(trials.wanted * EVERY_S / 60, 4, EVERY_S, trials.seed), tmp_path)
    assert found["problems"] == [] and found["same as undisturbed"]
    trials.add(sum(found["faults"].values()))
    assert set(found["faults"]) == set(WEIGHTS)
    trials.notes["median from an end to the next step (s)"] = found["median from an end to the next step (s)"]
    assert "| the same |" in soak_table(found)
    assert "failed: lost" in soak_table(found | {"problems": ["lost"], "same as undisturbed": False})


def test_the_mix_is_weighted_and_begins_with_one_of_each() -> None:
    drawn = faults(Random(0))
    first = [next(drawn) for _ in WEIGHTS]
    assert sorted(first) == sorted(WEIGHTS)
    many = [next(drawn) for _ in range(4660)]
    for kind, weight in WEIGHTS.items():
        assert abs(many.count(kind) - 10 * weight) < 120, kind
    assert sum(WEIGHTS.values()) == 466


def test_growth_is_seen_and_noise_is_none() -> None:
    noise = Random(1)
    for slope, handles in ((0.0, 0), (5e6 / 3600, 1)):
        growth = Growth()
        for second in range(0, 7200, 10):
            growth.seconds.append(second)
            growth.resident.append(3e8 + slope * second + noise.uniform(-1e6, 1e6))
            growth.handles.append(30 + handles * second // 3600 + noise.randrange(3))
        found = growth.megabytes_per_hour
        assert found is not None and abs(found - slope * 3600 / 1e6) < 0.5
        assert growth.handles_grew == bool(handles)
