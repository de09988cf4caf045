"""A flipped bit in numbers that several ranks hold is found within the interval, and tensor and rank are named."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from goals import Trials
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.checkpoint.messages import gather_to_all
from megatron_moe.config.errors import ConfigError, ReplicaError
from megatron_moe.data.batch import Batch
from megatron_moe.parallel.copies import dissent, with_others
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.trainer import Trainer
from tests.end_to_end.tiny_job import CPU, job, tables, write_corpus
from tests.training.bit_flips import (
    LAYOUTS,
    SHARDING,
    Flip,
    blocks_of,
    held_by_several,
    kind_of,
    make_trainer,
    place_of,
)

INTERVAL = 2
CLEAN = 1  # rounds in which nothing is flipped


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


class Rounds:
    """INTERVAL steps, over and over from the same numbers, so that the last one of them is checked."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        # without moments nothing could go wrong with them
        for _ in range(INTERVAL):
            trainer.train_step()
        self.batches: list[list[Batch]] = [trainer._next(trainer.loader) for _ in range(INTERVAL)]
        self.known: dict[Any, Tensor] = {
            place: tensor.clone() for place, tensor in blocks_of(trainer.engine).items()
        }

    def again(self) -> None:
        def fill(blocks: list[Any]) -> None:
            for block in blocks:
                block.tensor.copy_(self.known[block.name, block.offset, block.shape])

        engine = self.trainer.engine
        engine.fill_weights(fill)
        fill(engine.optimizer.blocks())
        engine.optimizer.step_count = INTERVAL

    def play(self, flip: Flip | None = None, before: int = 1) -> str:
        """The steps from one of them on, counted from 1, with a bit flipped before it; returns what the check says."""
        self.again()
        if flip is not None and flip.rank == self.trainer.state.rank:
            flip.strike(self.trainer.engine)
        for step in range(before, INTERVAL + 1):
            try:
                self.trainer.engine.train_step(INTERVAL + step - 1, self.batches[step - 1], "step 2 in runs")
            except ReplicaError as error:
                return str(error)
        return ""


    def healed(self, flip: Flip) -> bool:
        """Whether the update that followed has rounded the bit away, so that all holders agree again. Collective."""
        tensor = blocks_of(self.trainer.engine).get(flip.place)
        mine = "" if tensor is None else tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex()
        return len({told for told in gather_to_all(mine, self.trainer.state.world, CPU) if told}) == 1


def strike(
    rank: int, world_size: int, text: str, layout: str, seed: str, numbers: list[int]
) -> tuple[list[str], set[str]]:
    """What went wrong in these trials, and the kinds of tensors that several ranks hold."""
    rounds = Rounds(make_trainer(text, world_size))
    holders = held_by_several(rounds.trainer)
    engine, state = rounds.trainer.engine, rounds.trainer.state
    compared = {place_of(block) for copy in with_others(engine.copies(), state) for block in copy.blocks()}
    assert compared == {place for place, ranks in holders.items() if rank in ranks}, "all of it, and nothing else"
    problems = [f"false alarm: {told}" for told in (rounds.play() for _ in range(CLEAN)) if told]
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        flip = Flip.draw(number // len(LAYOUTS), rng, holders)
        # weights that are gathered, or cast from masters, are written anew by each step
        lasts = LAYOUTS[layout].weights_last or kind_of(flip.place[0]) in ("moments", "master", "state")
        before = rng.randint(1, INTERVAL) if lasts else INTERVAL
        told = rounds.play(flip, before)
        if not told and rounds.healed(flip):
            told = rounds.play(flip, INTERVAL)
        name, offset, shape = flip.place
        corner = ", ".join(f"{start}:{start + length}" for start, length in zip(offset, shape, strict=True))
        said = f"tensor '{name}' [{corner}] should be the same on all its holders, but {flip.verdict}"
        if said not in told or "The last good checkpoint: step 2 in runs" not in told:
            problems.append(f"trial {number}, {flip} before {before}: {told or 'nobody noticed'}")
    return problems, {kind_of(place[0]) for place in holders}


@pytest.mark.timeout(1800)  # by night
@pytest.mark.goal(
    "R28",
    ci=42,
    nightly=420,
    what="a bit flipped in one replica (weights, experts, routers, norms, tied embeddings, moments; 7 layouts): found "
    "within the interval, tensor and rank named on all ranks",
)
def test_a_flipped_bit_in_a_replica_is_found_within_the_interval(corpus: Path, trials: Trials) -> None:
    for place, (name, layout) in enumerate(LAYOUTS.items()):
        numbers = [n for n in range(trials.first, trials.first + trials.wanted) if n % len(LAYOUTS) == place]
        config = layout.job(corpus, training={"check_replicas_interval": INTERVAL})
        answers = run_on_ranks(layout.world_size, strike, config.to_json(), name, f"{trials.seed} {name}", numbers)
        problems, kinds = answers[0]
        assert not problems, (name, problems)
        assert all(answer == answers[0] for answer in answers), "all ranks say the same"
        assert kinds == layout.kinds, name
        trials.add(len(numbers))
    trials.notes["checks of clean steps, without alarm"] = len(LAYOUTS) * (CLEAN + 1)


def test_most_ranks_are_right_and_where_there_is_no_majority_nobody_is() -> None:
    assert dissent({0: "a", 1: "a"}) == ""
    assert dissent({0: "b", 2: "a", 5: "a"}) == "ranks [0] differ from ranks [2, 5], which agree"
    assert dissent({0: "a", 1: "b", 2: "a", 3: "c"}) == "ranks [1, 3] differ from ranks [0, 2], which agree"
    no_majority = "differ, and no majority tells which of them are right"
    assert dissent({3: "a", 7: "b"}) == f"ranks [3] and ranks [7] {no_majority}"
    assert dissent({0: "a", 1: "b", 2: "b", 3: "a"}) == f"ranks [0, 3] and ranks [1, 2] {no_majority}"


def test_an_interval_where_nothing_is_held_twice_is_refused(corpus: Path) -> None:
    config = job(corpus, training={"check_replicas_interval": 10})
    with pytest.raises(ConfigError, match="--check-replicas-interval 10 has no effect: no rank of this layout"):
        Trainer(config, ParallelState.alone(), CPU)


def poisoned(rank: int, world_size: int, text: str) -> str:
    trainer = make_trainer(text, world_size)
    if rank == 1:
        blocks_of(trainer.engine)["final_norm.weight", (0,), (16,)][3] = float("nan")
    try:
        trainer.train_step()
    except ReplicaError as error:
        return str(error)
    return ""


def test_a_number_that_is_none_is_traced_to_the_replica_before_its_turn(corpus: Path) -> None:
    config = LAYOUTS["DP 2"].job(corpus, training={"check_replicas_interval": 1000})
    told = run_on_ranks(2, poisoned, config.to_json())
    assert told[0] == told[1] and told[0].startswith("step 1: tensor 'final_norm.weight' [0:16] should be the same")
    assert "This step has updated nothing. The last good checkpoint: none in this run yet." in told[0]


def measure(rank: int, world_size: int, text: str) -> tuple[float, float]:
    """Seconds of a step, and of a check."""
    trainer = make_trainer(text, world_size)
    batches = trainer._next(trainer.loader)
    check = trainer.engine._replicas.check
    took: dict[str, list[float]] = {"step": [], "check": []}
    for _ in range(6):
        for name, work in (
            ("step", lambda: trainer.engine.train_step(0, batches)),
            ("check", lambda: check(100, None, suspect=False)),
        ):
            trainer.state.world.comm.barrier()
            started = time.perf_counter()
            work()
            took[name].append(time.perf_counter() - started)
    return min(took["step"]), min(took["check"])


@pytest.mark.goal("R28", ci=1, nightly=1, what="what the comparison of replicas costs every 100 steps, DP 2, no ZeRO")
def test_comparing_every_hundred_steps_costs_next_to_nothing(corpus: Path, trials: Trials) -> None:
    model = {"hidden_size": 128, "ffn_hidden_size": 256, "num_layers": 4}
    changes = {"model": {**tables(corpus)["model"], **model}, "data": {**tables(corpus)["data"], "seq_length": 128}}
    training = {"check_replicas_interval": 100, "global_batch_size": 8}
    config = job(corpus, parallel={SHARDING: "no_shard"}, training=training, **changes)
    step, check = run_on_ranks(2, measure, config.to_json())[0]
    trials.notes["share of the time (%)"] = round(check / (100 * step) * 100, 3)
    # four times the half per cent of the goal: clocks of a loaded machine
    assert check < 100 * step * 0.02
    trials.add(1)
