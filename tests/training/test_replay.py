"""A number that is none, anywhere in a step: found by all ranks at once, before an update, and traced to its place."""

import math
import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.messages import gather_to_all
from megatron_moe.config.errors import NonFiniteError
from megatron_moe.data.batch import Batch
from megatron_moe.parallel.communicator import Torch
from megatron_moe.training import engine as engine_module
from megatron_moe.training.engine import Engine
from megatron_moe.training.replay import verdict_of
from megatron_moe.training.trainer import Trainer
from tests.end_to_end.tiny_job import CPU, job, state_hash, write_corpus
from tests.training.bad_numbers import SITES, Strike
from tests.training.bit_flips import EP, ETP, PP, SHARDING, TP, make_trainer

SPARSE = {"layer_freq": "1"}
COLLECTIVES = (
    "start_all_reduce_",
    "start_all_gather",
    "start_all_gather_",
    "start_reduce_scatter",
    "start_all_to_all",
    "broadcast_",
)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "DP 2": (2, {}),
    "TP 2 x EP 2": (4, {TP: 2, EP: 2, ETP: 1}),
    "PP 2": (2, {PP: 2}),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


@dataclass
class Job:
    """A trainer after its first step, and the batches of the second."""

    trainer: Trainer
    batches: list[Batch]

    @classmethod
    def start(cls, text: str, world_size: int) -> "Job":
        trainer = make_trainer(text, world_size)
        trainer.train_step()
        return cls(trainer, trainer._next(trainer.loader))

    @property
    def engine(self) -> Engine:
        return self.trainer.engine

    def struck(self, strike: Strike) -> str:
        """What the second step says on this rank when it is struck; '' if it is made."""
        with strike.on(self.engine):
            try:
                self.engine.train_step(1, self.batches, "step 1 in runs")
            except NonFiniteError as error:
                return str(error)
        return ""


def expected(job: Job, strike: Strike) -> str:
    """Where the error must say that it began; told by the rank that was struck."""
    if strike.site == "optimizer state":
        return f"First not finite: the stored tensor {strike.tensor}, "
    ids = sorted(int(sample) for sample in job.batches[strike.microbatch].sample_ids)
    rank = f"rank {strike.rank}, micro-batch {strike.microbatch}, samples "
    samples = rank + ", ".join(map(str, ids))
    layer = f"layers.{strike.layer}"
    places = {
        "loss": f"the loss of the stage, {samples}",
        "activation": f"the output of {layer}.attention, layer {strike.layer}, {samples}",
        "gradient": f"the gradient of the output of {layer}.attention, layer {strike.layer}, {samples}",
        "router logit": f"the output of {layer}.mlp.router, layer {strike.layer}, {samples}",
        # its samples are those of all ranks that sent rows
        "expert output": f"the output of {layer}.mlp.experts, layer {strike.layer}, expert {strike.expert}, {rank}",
    }
    return f"First not finite: {places[strike.site]}"


def strike_all(rank: int, world_size: int, text: str, seed: str, numbers: list[int]) -> list[str]:
    """What went wrong in these trials."""
    job = Job.start(text, world_size)
    world = job.trainer.state.world
    problems = []
    for number in numbers:
        strike = Strike.draw(random.Random(f"{seed} {number}"), SITES[number % len(SITES)], job.engine)
        before = state_hash(job.trainer)
        told = job.struck(strike)
        same = before == state_hash(job.trainer)
        should = gather_to_all(expected(job, strike) if rank == strike.rank else "", world, CPU)[strike.rank]
        ids = [gather_to_all(str(batch.sample_ids.tolist()), job.trainer.state.ep, CPU) for batch in job.batches]
        if strike.site == "expert output":
            known = sorted({int(i) for text_ in ids[strike.microbatch] for i in text_.strip("[]").split(",")})
            samples = gather_to_all(f"samples {', '.join(map(str, known))}", world, CPU)[strike.rank]
            should = should.removesuffix("samples ") + samples
        kept = "The last good checkpoint is step 1"
        for wanted in ("step 2: ", "nothing was updated", kept, "gives the same", should):
            if wanted not in told:
                problems.append(f"trial {number}, {strike}: no {wanted!r} in {told!r}")
        if not same:
            problems.append(f"trial {number}, {strike}: weights or optimizer changed")
    result = job.engine.train_step(1, job.batches)
    assert math.isfinite(result.metrics.loss), "unharmed afterwards"
    return problems


@pytest.mark.timeout(1800)  # by night
@pytest.mark.goal(
    "R26",
    ci=48,
    nightly=960,
    what="NaN at 6 sites x rank x micro-batch, 4 layouts: all ranks stop in the same step, layer, expert and samples "
    "named, weights and optimizer bit-unchanged",
)
def test_a_number_that_is_none_is_found_at_once_and_traced_to_its_place(corpus: Path, trials: Trials) -> None:
    for place, (name, (world_size, parallel)) in enumerate(LAYOUTS.items()):
        share = range(trials.first, trials.first + trials.wanted)
        # the sites follow one another within a layout
        numbers = [n // len(LAYOUTS) for n in share if n % len(LAYOUTS) == place]
        config = job(corpus, moe=SPARSE, parallel=parallel)
        answers = run_on_ranks(world_size, strike_all, config.to_json(), f"{trials.seed} {name}", numbers)
        assert not answers[0], (name, answers[0])
        assert all(answer == answers[0] for answer in answers), "all ranks say the same"
        trials.add(len(numbers))


def strike_shards(rank: int, world_size: int, text: str) -> list[str]:
    """What must be said and what is, where weights and gradients are sharded too."""
    job = Job.start(text, world_size)
    problems = []
    for site in ("activation", "gradient", "expert output", "optimizer state"):
        strike = Strike(site, rank=1, microbatch=1)
        before = state_hash(job.trainer)
        told = job.struck(strike)
        should = gather_to_all(expected(job, strike) if rank == 1 else "", job.trainer.state.world, CPU)[1]
        if should.removesuffix("samples ") not in told or before != state_hash(job.trainer):
            problems.append(f"{strike}: {told!r}, not {should!r}")
    return problems


def test_the_same_where_weights_are_sharded(corpus: Path) -> None:
    config = job(corpus, moe=SPARSE, parallel={SHARDING: "optim_grads_params"})
    assert run_on_ranks(2, strike_shards, config.to_json()) == [[], []]


def fail_once(rank: int, world_size: int, text: str) -> tuple[list[str], list[str]]:
    """States after a step that was struck in one pass only, and after the same step unharmed; what was logged."""
    told: list[str] = []
    hashes = []
    for strike in (Strike("activation", rank=1, microbatch=0, times=1), None):
        job = Job.start(text, world_size)
        with mock.patch.object(engine_module.logger, "warning", lambda said, *rest: told.append(said % rest)):
            assert strike is None or job.struck(strike) == ""
        if strike is None:
            job.engine.train_step(1, job.batches)
        hashes.append(state_hash(job.trainer))
    return hashes, told


@pytest.mark.goal("R26", ci=1, nightly=1, what="NaN in one pass only: told, and the step goes on from the second pass")
@pytest.mark.parametrize("parallel", [{}, {PP: 2}], ids=["DP 2", "PP 2"])
def test_a_fault_that_does_not_come_again_costs_one_pass(
    corpus: Path, trials: Trials, parallel: dict[str, Any]
) -> None:
    answers = run_on_ranks(2, fail_once, job(corpus, moe=SPARSE, parallel=parallel).to_json())
    for (struck, unharmed), told in answers:
        assert struck == unharmed, "bit-identical to the step that nothing struck"
        assert len(told) == 1 and "Played again, the step is finite" in told[0] and "step 2" in told[0]
    trials.add(trials.wanted)


def test_the_three_verdicts() -> None:
    nan, inf = math.nan, math.inf
    assert verdict_of((nan, nan), (2.0, 1.0)) == "transient"
    assert verdict_of((nan, nan), (nan, nan)) == "persistent"
    assert verdict_of((2.5, inf), (2.5, inf)) == "persistent"
    assert verdict_of((2.5, inf), (2.5, nan)) == "unstable"
    assert verdict_of((2.5, nan), (2.25, nan)) == "unstable"


def calls_of_a_step(rank: int, world_size: int, texts: list[str]) -> list[list[str]]:
    """The collectives of a healthy step, one list for each configuration, in which nothing may be replayed."""
    found = []
    for text in texts:
        job = Job.start(text, world_size)
        calls: list[str] = []

        def counted(name: str, real: Any, calls: list[str] = calls) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                calls.append(name)
                return real(*arguments, **named)

            return call

        with ExitStack() as stack:
            for name in COLLECTIVES:
                stack.enter_context(mock.patch.object(Torch, name, counted(name, getattr(Torch, name))))
            stack.enter_context(mock.patch.object(engine_module, "Probe", None))
            job.trainer.engine.train_step(1, job.batches)
        found.append(calls)
    return found


def test_looking_for_such_numbers_exchanges_nothing_more(corpus: Path) -> None:
    off = {"check_for_nan_in_loss_and_grad": False}
    everything = {"nonfinite_action": "skip", "spike_sigma": 6.0}
    texts = [job(corpus, moe=SPARSE, training=training).to_json() for training in (off, {}, everything)]
    for without, by_default, with_all in run_on_ranks(2, calls_of_a_step, texts):
        assert without and without == by_default == with_all
