"""A number that is none, anywhere in a step: found by all ranks at once, before an update, and traced to its place."""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.messages import gather_to_all
from megatron_moe.config.errors import NonFiniteError
from megatron_moe.data.batch import Batch
from megatron_moe.training.engine import Engine
from megatron_moe.training.replay import verdict_of
from megatron_moe.training.trainer import Trainer
from tests.end_to_end.tiny_job import CPU, job, state_hash, write_corpus
from tests.training.bad_numbers import SITES, Strike
from tests.training.bit_flips import EP, ETP, PP, SHARDING, TP, make_trainer

SPARSE = {"layer_freq": "1"}
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
        for wanted in ("step 2: ", "nothing was updated", "The last good checkpoint is step 1", "gives the same", should):
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
