"""What a checkpoint saves is compared among all holders: copies that differ are not saved, and the last one stays."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.config.errors import ReplicaError
from megatron_moe.data.batch import Batch
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import StepResult
from megatron_moe.training.trainer import FINISHED, Trainer
from tests.end_to_end.tiny_job import state_hash, write_corpus
from tests.training.bit_flips import LAYOUTS, Flip, held_by_several, kind_of, make_trainer

GOOD = 2  # the step of the checkpoint that must be kept


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def save_damaged(trainer: Trainer, flip: Flip) -> str:
    """Try to save one step more with a flipped bit; returns what is said of it, with the bit as it was."""
    mine = flip.rank == trainer.state.rank
    if mine:
        flip.strike(trainer.engine)
    trainer.step += 1
    try:
        trainer._save(last=True)
        trainer._finish_saving()
    except ReplicaError as error:
        return str(error)
    finally:
        if mine:
            flip.strike(trainer.engine)
    return ""


def strike(rank: int, world_size: int, text: str, seed: str, numbers: list[int]) -> tuple[list[str], set[str]]:
    """What went wrong in these trials, and the kinds of tensors that several ranks hold."""
    trainer = make_trainer(text, world_size)
    for _ in range(GOOD):
        trainer.train_step()
    trainer._save(last=True)
    trainer._finish_saving()
    holders = held_by_several(trainer)
    problems = []
    for number in numbers:
        flip = Flip.draw(number // len(LAYOUTS), random.Random(f"{seed} {number}"), holders)
        told = save_damaged(trainer, flip)
        name = f"tensor '{flip.place[0]}' "
        if name not in told or flip.verdict not in told or f"The last good checkpoint: step {GOOD}." not in told:
            problems.append(f"trial {number}, {flip}: {told or 'nobody noticed'}")
    return problems, {kind_of(place[0]) for place in holders}


@pytest.mark.timeout(1800)  # by night
@pytest.mark.goal(
    "R29",
    ci=84,
    nightly=840,
    what="a bit flipped in one holder of what several save (every kind; 7 layouts): the save is refused, tensor and "
    "ranks are named, the last checkpoint stays whole",
)
def test_copies_that_differ_are_not_saved(corpus: Path, tmp_path: Path, trials: Trials) -> None:
    for place, (name, layout) in enumerate(LAYOUTS.items()):
        numbers = [n for n in range(trials.first, trials.first + trials.wanted) if n % len(LAYOUTS) == place]
        folder = tmp_path / name.replace(" ", "")
        # every second layout beside the training
        saving = {"save": str(folder), "async_save": place % 2 == 0}
        config = layout.job(corpus, checkpoint=saving)
        answers = run_on_ranks(layout.world_size, strike, config.to_json(), f"{trials.seed} {name}", numbers)
        problems, kinds = answers[0]
        assert not problems, (name, problems)
        assert all(answer == answers[0] for answer in answers), "all ranks say the same"
        assert kinds == layout.kinds, name
        assert sorted(os.listdir(folder)) == ["latest", f"step_{GOOD:08}"]
        assert find_checkpoint(folder, None, ParallelState.alone().world, strict=True, check="sha256").step == GOOD
        trials.add(len(numbers))


def interrupted(rank: int, world_size: int, text: str, clean: str) -> tuple[str, list[str]]:
    """A run that a flipped bit stops, and a second start of it; returns what stopped it, and hashes of two ends."""
    trainer = make_trainer(text, world_size)
    train = trainer.engine.train_step

    def watched(step: int, batches: Sequence[Batch], last_checkpoint: str | None = None) -> StepResult:
        result: StepResult = train(step, batches, last_checkpoint)
        if step + 1 == 3 and rank == 1:
            flip.strike(trainer.engine)
        return result

    holders: dict[Any, list[int]] = {
        place: ranks for place, ranks in held_by_several(trainer).items() if place[0] == "final_norm.weight"
    }
    flip = Flip(*next(iter(holders.items())), rank=1, bit=21)
    trainer.engine.train_step = watched  # type: ignore[method-assign]
    told = ""
    try:
        trainer.run()
    except ReplicaError as error:
        told = str(error)
    ends = []
    for start in (text, clean):
        trainer = make_trainer(start, world_size)
        assert trainer.run() == FINISHED
        ends.append(state_hash(trainer))
    return told, ends


def test_a_run_whose_save_is_refused_ends_and_goes_on_from_the_checkpoint_before(corpus: Path, tmp_path: Path) -> None:
    """Its later saves would be refused as well: nothing is lost by ending, and the time until then is."""
    training = {"train_iters": 6}
    saving = {"save": str(tmp_path), "save_interval": 2, "load": "latest"}
    layout = LAYOUTS["DP 4"]
    broken = layout.job(corpus, training=training, checkpoint=saving)
    clean = layout.job(corpus, training=training)
    answers = run_on_ranks(4, interrupted, broken.to_json(), clean.to_json())
    for told, (resumed, unbroken) in answers:
        assert told.startswith("step 4 was not saved: model tensor 'final_norm.weight' [0:16]")
        assert "ranks [1] differ from ranks [0, 2, 3], which agree" in told
        assert told.endswith("The last good checkpoint: step 2.")
        assert resumed == unbroken
    assert sorted(tmp_path.glob("step_*")) == [tmp_path / f"step_{step:08}" for step in (2, 4, 6)]
