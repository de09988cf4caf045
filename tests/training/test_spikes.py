"""Leaps of loss and gradient norm, on synthetic curves whose leaps are known, and in a run."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.config.errors import SpikeError
from megatron_moe.training.spikes import SpikeWatch
from tests.end_to_end.tiny_job import job, state_hash, write_corpus
from tests.training.bit_flips import make_trainer

LENGTH = 128


def is_spike(watch: SpikeWatch, loss: float, norm: float) -> bool:
    try:
        watch.judge(loss, norm)
    except SpikeError:
        return True
    return False


def normal(rng: random.Random) -> float:
    return rng.gauss(0.0, 1.0)


def heavy(rng: random.Random) -> float:
    """Student's t with 5 degrees of freedom, scaled to a standard deviation of 1."""
    return rng.gauss(0.0, 1.0) / math.sqrt(rng.gammavariate(2.5, 2.0) / 5.0) / math.sqrt(5.0 / 3.0)


def curve(rng: random.Random, steps: int, noise: Any, slope: float) -> Iterator[tuple[float, float, float]]:
    """(expected loss, loss, gradient norm) of each step; slope: fall of the loss in a step, in deviations."""
    for step in range(steps):
        mean = 3.0 + slope * 0.02 * (steps - step)
        yield mean, mean + 0.02 * noise(rng), 1.0 + 0.1 * noise(rng)


@pytest.mark.goal(
    "R27",
    ci=200,
    nightly=5000,
    what="loss or gradient norm at least 6 deviations up on a clean seeded curve (--spike-sigma 5, window 128): caught",
)
def test_leaps_are_caught(trials: Trials) -> None:
    caught = 0
    for number, rng in trials:
        watch = SpikeWatch(5.0, LENGTH)
        steps = list(curve(rng, LENGTH + rng.randrange(1, 64), normal, slope=rng.choice([0.0, 0.001])))
        for _, loss, norm in steps:
            is_spike(watch, loss, norm)
        mean, far = steps[-1][0], rng.uniform(6.0, 12.0)
        caught += is_spike(watch, mean + 0.02 * far, 1.0) if number % 2 else is_spike(watch, mean, 1.0 + 0.1 * far)
    trials.notes["caught (%)"] = round(100 * caught / trials.done, 2)
    assert caught >= 0.99 * trials.done


@pytest.mark.goal(
    "R27",
    ci=20_000,
    nightly=1_000_000,
    what="clean steps, normal noise, falling loss: at most 1e-4 false alarms a step",
)
def test_clean_curves_raise_no_alarm(trials: Trials) -> None:
    rng = random.Random(trials.seed)
    alarms = {}
    for name, sigma, noise in (("5 sigma", 5.0, normal), ("6 sigma", 6.0, normal), ("6 sigma, heavy", 6.0, heavy)):
        watch = SpikeWatch(sigma, LENGTH)
        steps = curve(rng, trials.wanted, noise, slope=0.001)
        alarms[name] = sum(is_spike(watch, loss, norm) for _, loss, norm in steps)
        trials.notes[f"false alarms, {name} (per 10^4 steps)"] = round(alarms[name] / trials.wanted * 1e4, 2)
    assert alarms["5 sigma"] <= max(1, 1e-4 * trials.wanted)
    assert alarms["6 sigma"] <= max(1, 1e-4 * trials.wanted)
    trials.add(trials.wanted)


def test_deviations_of_a_window_by_hand() -> None:
    watch = SpikeWatch(3.0, 4)
    for loss in (1.0, 3.0):
        assert not is_spike(watch, loss, 1.0)
    # mean 2, deviation sqrt 2
    assert watch.figures["loss"].sigmas(2.0 + 3.0 * math.sqrt(2.0)) == pytest.approx(3.0)
    assert is_spike(watch, 2.0 + 3.1 * math.sqrt(2.0), 1.0)
    assert not is_spike(watch, 2.0 + 2.9 * math.sqrt(2.0), 1.0)
    assert is_spike(watch, 2.0, 1.1), "of a norm that never moves, any rise is far"
    assert not is_spike(watch, -1e9, 1.0), "only upwards"


def test_nothing_is_judged_before_half_a_window_or_without_a_limit() -> None:
    watch = SpikeWatch(3.0, 8)
    assert not any(is_spike(watch, loss, 1.0) for loss in (1.0, 1.1, 1.0, 1e9))
    silent = SpikeWatch(None, 8)
    assert not any(is_spike(silent, loss, 1.0) for loss in (1.0, 1.1, 1.0, 1.1, 1.0, 1.0, 1e9))
    assert silent.state_dict() == {"loss": [], "gradient norm": []}


def test_a_window_goes_on_as_if_it_had_not_been_saved() -> None:
    rng = random.Random(3)
    watch, again = SpikeWatch(6.0, 16), SpikeWatch(6.0, 16)
    for _, loss, norm in curve(rng, 40, normal, 0.1):
        is_spike(watch, loss, norm)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    for _, loss, norm in curve(rng, 40, normal, 0.1):
        assert is_spike(watch, loss, norm) == is_spike(again, loss, norm)
    assert watch.state_dict() == again.state_dict()
    again.load_state_dict({})
    assert again.state_dict() == {"loss": [], "gradient norm": []}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def leap(rank: int, world_size: int, text: str) -> tuple[list[bool], bool, list[str]]:
    """Which of four steps were made, whether the one that leapt changed anything, and why it was skipped."""
    trainer = make_trainer(text, world_size)
    made = [trainer.train_step() is not None for _ in range(2)]
    # as if training had been calm for long
    trainer.spikes.load_state_dict({"loss": [0.5, 0.51] * 2, "gradient norm": [1e3, 2e3] * 2})
    before = state_hash(trainer)
    trainer.loader.sampler.consumed -= 4
    made.append(trainer.train_step() is not None)
    unchanged = state_hash(trainer) == before
    trainer.spikes.load_state_dict({})
    made.append(trainer.train_step() is not None)
    return made, unchanged, [step.reason for step in trainer.skipped.steps]


def test_a_step_that_leaps_is_not_learnt_from(corpus: Path) -> None:
    config = job(corpus, training={"spike_sigma": 6.0, "spike_window": 4})
    assert run_on_ranks(2, leap, config.to_json()) == [([True, True, False, True], True, ["spike"])] * 2
