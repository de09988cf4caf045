"""Back to an older checkpoint after a spike, and past the samples that led there."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.checkpoint.rotate import step_folder, stored_steps
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.checkpoint.storage import Storage
from megatron_moe.config.errors import ConfigError, SpikeError, StorageError
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import grid_of
from megatron_moe.training.rewind import way_back
from megatron_moe.training.skipped import SkippedStep
from megatron_moe.training.trainer import Trainer
from tests.end_to_end.tiny_job import CPU, GLOBAL_BATCH, job, state_hash, write_corpus
from tests.training.bit_flips import LAYOUTS, ROUTER

STEPS = 10
# step 7 is a spike: samples 24 to 27; the newest checkpoint at least 2 steps before is that of step 4
SPIKE = 7
WATCH = {"spike_sigma": 50.0, "spike_window": 4, "train_iters": STEPS}
REWIND = {**WATCH, "spike_action": "rewind", "spike_rewind_steps": 2}
PAST = {"train_iters": STEPS, "skip_samples": ["16-27"]}
SAVED = {"save_interval": 2, "load": "latest"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def build(config: RunConfig, *spikes: int) -> Trainer:
    """A trainer for whom the samples of these steps, were none left out, make a spike."""
    size = config.training.global_batch_size
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    state = ParallelState.alone() if world == 1 else ParallelState.distributed(grid_of(config, world))
    trainer = Trainer(config, state, CPU)
    real = trainer.spikes.judge

    def judge(loss: float, norm: float) -> None:
        real(loss * 1e6 if trainer.loader.sampler.consumed in [size * step for step in spikes] else loss, norm)

    trainer.engine.judge = judge
    return trainer


def run(config: RunConfig, *spikes: int) -> Trainer:
    trainer = build(config, *spikes)
    trainer.run()
    return trainer


def hash_of_run(rank: int, world_size: int, text: str, *spikes: int) -> tuple[str, list[SkippedStep]]:
    trainer = run(RunConfig.from_json(text), *spikes)
    return state_hash(trainer), trainer.skipped.steps


@pytest.mark.night
@pytest.mark.goal("R27", ci=1, nightly=1, what="rewound after a spike by itself: bit-identical to a run told to skip")
@pytest.mark.parametrize("name", [None, *(name for name in LAYOUTS if name not in ("DP 2", "DP 4"))])
def test_a_rewound_run_is_one_that_was_told_to_skip(
    corpus: Path, tmp_path: Path, trials: Any, name: str | None
) -> None:
    layout = LAYOUTS[name] if name else None
    ranks, change = 1, {"moe": ROUTER}
    if layout is not None:
        ranks = layout.world_size
        change |= {"parallel": layout.parallel, "precision": {"dtype": layout.dtype}}
    saved = {"save": str(tmp_path / "saved"), **SAVED}
    rewound = job(corpus, training=REWIND, checkpoint=saved, **change)
    told = job(corpus, training=PAST, **change)
    found = run_on_ranks(ranks, hash_of_run, rewound.to_json(), SPIKE)
    wanted = run_on_ranks(ranks, hash_of_run, told.to_json())
    assert [state for state, _ in found] == [state for state, _ in wanted]
    assert all(steps == [SkippedStep(SPIKE, 16, 27, "spike", 4)] for _, steps in found)
    # step 6 was saved before and after
    state = json.loads((step_folder(tmp_path / "saved", 6) / "state.json").read_text())
    assert state["loader"] == {"consumed_samples": 36}
    trials.add(1)


def test_threads_that_read_ahead_go_back_too(corpus: Path, tmp_path: Path) -> None:
    data = {"num_workers": 2}
    found = run(job(corpus, training=REWIND, checkpoint={"save": str(tmp_path / "a"), **SAVED}, data=data), SPIKE)
    assert state_hash(found) == state_hash(run(job(corpus, training=PAST, data=data)))


@pytest.mark.parametrize("stop", [6, 8])
def test_a_run_that_is_stopped_later_goes_on_as_the_whole(corpus: Path, tmp_path: Path, stop: int) -> None:
    whole = run(job(corpus, training=REWIND, checkpoint={"save": str(tmp_path / "whole"), **SAVED}), SPIKE)
    folder = {"save": str(tmp_path / "halves"), **SAVED}
    for training in ({**REWIND, "exit_interval": stop}, REWIND):
        half = run(job(corpus, training=training, checkpoint=folder), SPIKE)
    assert half.first_step == stop
    assert state_hash(half) == state_hash(whole) and half.skipped.steps == whole.skipped.steps
    assert half.spikes.state_dict() == whole.spikes.state_dict()


class Killed(Exception):
    """In place of SIGKILL."""


class KilledAtRename(Storage):
    """Ends at a rename of a checkpoint that is to go."""

    def __init__(self, of: int) -> None:
        self.left = of

    def rename(self, old: Path, new: Path) -> None:
        if new.name.endswith("-removed"):
            self.left -= 1
            if not self.left:
                raise Killed
        super().rename(old, new)


@pytest.mark.goal("R27", ci=1, nightly=1, what="killed while going back: started again, the same run")
@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_while_going_back_changes_nothing(corpus: Path, tmp_path: Path, at: int, trials: Any) -> None:
    training = {**REWIND, "spike_rewind_steps": 4}  # back to step 2; 4 and 6 go
    whole = run(job(corpus, training=training, checkpoint={"save": str(tmp_path / "whole"), **SAVED}), SPIKE)
    assert whole.skipped.steps[0].back_to == 2
    config = job(corpus, training=training, checkpoint={"save": str(tmp_path / "killed"), **SAVED})
    trainer = build(config, SPIKE)
    assert trainer.writer is not None
    trainer.writer._rotation._storage = KilledAtRename(at)
    with pytest.raises(Killed):
        trainer.run()
    assert stored_steps(tmp_path / "killed") == ([6, 4, 2], [4, 2])[at - 1]
    again = run(config, SPIKE)
    assert again.first_step == (6, 4)[at - 1]
    assert state_hash(again) == state_hash(whole)
    trials.add(1)


def test_spikes_that_do_not_end_stop_the_run(corpus: Path, tmp_path: Path) -> None:
    training = {**REWIND, "max_skipped_steps": 2}
    config = job(corpus, training=training, checkpoint={"save": str(tmp_path / "a"), **SAVED})
    with pytest.raises(SpikeError, match="2 times already, as often as --max-skipped-steps") as caught:
        # each time the third step after step 4 is one
        run(config, 7, 10, 13)
    assert caught.value.exit_code == 16
    assert 4 in stored_steps(tmp_path / "a")


def test_a_broken_checkpoint_is_passed_over(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "a"
    trainer = build(job(corpus, training=REWIND, checkpoint={"save": str(root), **SAVED}), SPIKE)
    judge = trainer.engine.judge

    def damage(loss: float, norm: float) -> None:
        if trainer.step == SPIKE - 1:
            file = next(step_folder(root, 4).glob("model-*"))
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        judge(loss, norm)

    trainer.engine.judge = damage
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert trainer.skipped.steps == [SkippedStep(SPIKE, 8, 27, "spike", 2)]
    assert "newer checkpoints are broken:\n  step 4" in caplog.text
    assert "by hand: --ckpt-step 2 --skip-samples 8-27" in caplog.text


def test_without_a_checkpoint_the_step_is_skipped(corpus: Path, tmp_path: Path) -> None:
    found = run(job(corpus, training=REWIND, checkpoint={"save": str(tmp_path / "a"), "save_interval": 9}), SPIKE)
    assert found.skipped.steps == [SkippedStep(SPIKE, 24, 27, "spike")]
    assert state_hash(found) == state_hash(run(job(corpus, training=WATCH), SPIKE))


@pytest.mark.parametrize(("distance", "found"), [(1, 8), (3, 8), (4, 6), (6, 4), (7, 4), (100, 4)])
def test_the_newest_that_is_old_enough_else_the_oldest(tmp_path: Path, distance: int, found: int) -> None:
    for step in (4, 6, 8, 12):
        step_folder(tmp_path, step).mkdir()
    world = ParallelState.alone().world
    assert way_back(tmp_path, 11, distance, world, CPU) == found
    assert way_back(tmp_path, 4, distance, world, CPU) is None


class Unremovable(Storage):
    def rename(self, old: Path, new: Path) -> None:
        if new.name.endswith("-removed"):
            raise PermissionError(13, "Permission denied")
        super().rename(old, new)


def test_a_later_checkpoint_that_stays_ends_the_run(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, ParallelState.alone().world, None, "run", Unremovable(), background=False)
    for step in (2, 4):
        block = Block("w", (1,), (0,), torch.ones(1), primary=True)
        writer.save(step, {"model": [block]}, {"step": step}, "{}", {})
    with pytest.raises(StorageError, match="step_00000004 cannot be removed, and the run went back to step 2"):
        writer.go_back(2)
    assert stored_steps(tmp_path) == [4, 2]


def test_what_the_log_knew_of_later_steps_is_dropped(corpus: Path, tmp_path: Path) -> None:
    logging_ = {"log_dir": str(tmp_path / "log")}
    saved = {"save": str(tmp_path / "a"), **SAVED}
    run(job(corpus, training=REWIND, checkpoint=saved, logging=logging_), SPIKE)
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    consumed = [line["consumed_samples"] // GLOBAL_BATCH for line in lines]
    assert consumed == [1, 2, 3, 4, 8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize(
    ("training", "checkpoint", "told"),
    [
        ({"spike_action": "rewind"}, {"save": "a", "save_interval": 2}, "--spike-action"),
        (REWIND, {"save": "a"}, "--spike-action"),
        ({**WATCH, "spike_rewind_steps": 3}, {"save": "a", "save_interval": 2}, "--spike-rewind-steps"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    corpus: Path, training: dict[str, Any], checkpoint: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        job(corpus, training=training, checkpoint=checkpoint)
