"""The loop around a step: logging, evaluation, saving, stopping and going on."""

import errno
import json
import logging
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_moe.checkpoint.rotate import stored_steps
from megatron_moe.checkpoint.storage import Storage
from megatron_moe.config.errors import NoCheckpointError, NoProgressError, StorageError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.models.whole import whole_logits
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import StepResult
from megatron_moe.training.restarts import FILE
from megatron_moe.training.trainer import FINISHED, PREEMPTED, Trainer
from tests.end_to_end.tiny_job import CPU, GLOBAL_BATCH, VOCAB, job, state_hash, write_corpus

# random second experts: whatever draws a number too many shows
GSHARD: dict[str, Any] = {"router_type": "gshard"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def trainer(config: RunConfig) -> Trainer:
    return Trainer(config, ParallelState.alone(), CPU)


def after_step(job: Trainer, do: Callable[[int], None]) -> None:
    """Call do(step), counted from 1, when the engine has finished it and nothing is logged or saved yet."""
    train = job.engine.train_step

    def watched(step: int, batches: Sequence[Batch], last_checkpoint: str | None = None) -> StepResult:
        result = train(step, batches, last_checkpoint)
        do(step + 1)
        return result

    job.engine.train_step = watched  # type: ignore[method-assign]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Lost(Exception):
    """Stands in for the end of the process."""


def lose_at(job: Trainer, step: int) -> None:
    def lose(done: int) -> None:
        if done == step:
            raise Lost

    after_step(job, lose)
    with pytest.raises(Lost):
        job.run()


# logging


def test_the_first_step_and_every_nth_are_logged(corpus: Path, tmp_path: Path) -> None:
    config = job(corpus, logging={"log_interval": 5, "log_dir": str(tmp_path)})
    assert trainer(config).run() == FINISHED
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 5, 10]
    assert [line["consumed_samples"] for line in found] == [step * GLOBAL_BATCH for step in (1, 5, 10)]
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_dict()


def test_a_resumed_run_first_logs_the_next_step(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = job(
        corpus,
        checkpoint={"save": str(tmp_path), "load": "latest"},
        logging={"log_interval": 5},
        training={"exit_interval": 7},
    )
    assert trainer(config).run() == FINISHED
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert trainer(config).run() == FINISHED
    told = [message for message in caplog.messages if message.startswith(" iteration")]
    assert told[0].startswith(" iteration        8/      12 | consumed samples:           32 |")
    assert [message.split("/")[0].split()[-1] for message in told] == ["8", "10"]


def test_metrics_and_tensorboard_go_on_without_a_gap_or_a_step_twice(corpus: Path, tmp_path: Path) -> None:
    logs, board = tmp_path / "log", tmp_path / "board"
    config = job(
        corpus,
        checkpoint={"save": str(tmp_path / "saved"), "load": "latest", "save_interval": 3, "async_save": False},
        logging={"log_dir": str(logs), "tensorboard_dir": str(board)},
        training={"eval_interval": 4, "eval_iters": 1},
    )
    lose_at(trainer(config), 9)  # steps 7 and 8 were logged, and 8 evaluated, but 6 is what was saved
    first = lines(logs)
    assert [line["step"] for line in first if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert trainer(config).run() == FINISHED
    found = lines(logs)
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in found if "validation_loss" in line] == [4, 8, 12]
    # done twice, to the same end
    assert [line["loss"] for line in steps[:8]] == [line["loss"] for line in first if "loss" in line]

    events = EventAccumulator(str(board)).Reload()
    assert [event.step for event in events.Scalars("lm loss")] == list(range(1, 13))
    assert [event.value for event in events.Scalars("lm loss")] == pytest.approx([line["loss"] for line in steps])
    assert [event.step for event in events.Scalars("lm-loss-validation/lm loss")] == [4, 8, 12]


# evaluation


def test_evaluation_does_not_change_training(corpus: Path) -> None:
    hashes: list[list[str]] = []
    for training in ({}, {"eval_interval": 1, "eval_iters": 2}):
        found: list[str] = []
        run = trainer(job(corpus, moe=GSHARD, training=training))
        after_step(run, lambda step, run=run, found=found: found.append(state_hash(run)))  # type: ignore[misc]
        assert run.run() == FINISHED
        hashes.append(found)
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == 12


def test_the_validation_loss_is_the_mean_over_the_first_samples_of_the_split(corpus: Path) -> None:
    run = trainer(job(corpus, moe=GSHARD, training={"eval_interval": 12, "eval_iters": 3}))
    assert run.run() == FINISHED  # fresh weights are too small to tell one expert from another
    valid = run.datasets["valid"]
    assert valid is not None
    # one sample at a time, as a trained model is asked: the second expert is not drawn
    losses = []
    for number in range(3 * GLOBAL_BATCH):
        stream = valid.get([number]).decoder
        logits, _ = whole_logits(run.engine.stages[0], stream.tokens)
        losses.append(float(torch.nn.functional.cross_entropy(logits[0, :, :VOCAB], stream.labels[0])))
    assert run.validation_loss() == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    assert run.loader.state_dict() == {"consumed_samples": 12 * GLOBAL_BATCH}


# stopping


def test_exit_interval_ends_with_0_and_a_checkpoint_at_a_multiple(corpus: Path, tmp_path: Path) -> None:
    config = job(corpus, training={"exit_interval": 5}, checkpoint={"save": str(tmp_path), "load": "latest", "keep": 9})
    for expected in ([5], [10, 5], [12, 10, 5], [12, 10, 5]):
        assert trainer(config).run() == FINISHED
        assert stored_steps(tmp_path) == expected


def test_exit_duration_ends_with_0_and_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    config = job(corpus, training={"exit_duration_in_mins": 1e-9}, checkpoint={"save": str(tmp_path)})
    assert trainer(config).run() == FINISHED
    assert stored_steps(tmp_path) == [1]
    later = job(corpus, training={"exit_duration_in_mins": 60.0})
    run = trainer(later)
    assert run.run() == FINISHED and run.step == 12


def test_a_signal_while_the_run_starts_ends_it_before_its_first_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(job(corpus, checkpoint={"save": str(tmp_path)}))
    restore = run.restore

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        restore()

    monkeypatch.setattr(run, "restore", interrupted)
    assert run.run() == PREEMPTED
    assert run.step == 0 and list(tmp_path.iterdir()) == []


def test_a_signal_without_a_place_to_save_does_not_claim_a_checkpoint(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(job(corpus))
    after_step(run, lambda step: os.kill(os.getpid(), signal.SIGUSR1))
    assert run.run() == PREEMPTED
    assert "without --save, no checkpoint is written" in caplog.text


def test_a_signal_in_the_last_step_is_no_reason_to_come_back(corpus: Path) -> None:
    run = trainer(job(corpus, training={"train_iters": 3}))
    after_step(run, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    assert run.run() == FINISHED


# saving


@pytest.mark.parametrize("background", [True, False], ids=["saved beside", "saved at once"])
def test_only_the_newest_are_kept(background: bool, corpus: Path, tmp_path: Path) -> None:
    saving = {"save": str(tmp_path), "save_interval": 2, "keep": 3, "async_save": background}
    assert trainer(job(corpus, checkpoint=saving)).run() == FINISHED
    assert stored_steps(tmp_path) == [12, 10, 8]


class FullDisk(Storage):
    """No room while `full`."""

    full = False

    def write(self, file: int, data: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(file, data)


@pytest.mark.parametrize("background", [True, False], ids=["saved beside", "saved at once"])
@pytest.mark.parametrize(("full", "kept"), [((4, 6), [12, 10, 8, 2]), ((8, 12), [6, 4, 2])])
def test_a_full_disk_costs_checkpoints_and_the_last_one_the_exit_code(
    full: tuple[int, int], kept: list[int], background: bool, corpus: Path, tmp_path: Path
) -> None:
    saving = {"save": str(tmp_path), "save_interval": 2, "async_save": background}
    run = trainer(job(corpus, checkpoint=saving))
    disk = FullDisk()
    assert run.writer is not None
    run.writer._storage = disk

    def fill(step: int) -> None:
        run.writer.commit_if_ready(block=True)  # type: ignore[union-attr]
        disk.full = full[0] <= step <= full[1]

    after_step(run, fill)
    if kept[0] == 12:
        assert run.run() == FINISHED
    else:
        with pytest.raises(StorageError, match="step 12 was not saved: .*No space left"):
            run.run()
    assert run.step == 12
    assert stored_steps(tmp_path) == kept


# going on


@pytest.mark.parametrize("background", [True, False], ids=["saved beside", "saved at once"])
def test_only_attempts_that_leave_no_newer_checkpoint_count_as_lost(
    background: bool, corpus: Path, tmp_path: Path
) -> None:
    saving = {"save": str(tmp_path), "load": "latest", "save_interval": 4, "async_save": background}
    config = job(corpus, checkpoint={**saving, "max_restarts_without_progress": 2})
    lose_at(trainer(config), 3)
    assert (tmp_path / FILE).exists()
    run = trainer(config)
    after_step(run, lambda step: run.writer.commit_if_ready(block=True) and None)  # type: ignore[union-attr]
    lose_at(run, 7)
    assert stored_steps(tmp_path) == [4] and not (tmp_path / FILE).exists()
    for _ in range(2):
        lose_at(trainer(config), 6)
    with pytest.raises(NoProgressError, match="the last 2 attempts, from step 4 on, ended without"):
        trainer(config)
    # a run that reaches its end leaves no count behind
    more = job(corpus, checkpoint={**saving, "max_restarts_without_progress": None})
    assert trainer(more).run() == FINISHED
    assert not (tmp_path / FILE).exists()


def test_a_finished_run_may_be_started_as_often_as_one_likes(corpus: Path, tmp_path: Path) -> None:
    config = job(corpus, training={"train_iters": 3}, checkpoint={"save": str(tmp_path), "load": "latest"})
    for _ in range(5):
        assert trainer(config).run() == FINISHED
        assert not (tmp_path / FILE).exists()


def test_what_ends_before_the_first_step_is_no_attempt(corpus: Path, tmp_path: Path) -> None:
    saving = {"save": str(tmp_path / "saved"), "load": str(tmp_path / "nowhere"), "exit_on_missing_checkpoint": True}
    for _ in range(5):
        with pytest.raises(NoCheckpointError):
            trainer(job(corpus, checkpoint=saving)).run()
    assert not (tmp_path / "saved").exists()


@pytest.fixture
def half(corpus: Path, tmp_path: Path) -> Path:
    """A run that was stopped after 6 steps."""
    config = job(corpus, training={"exit_interval": 6}, checkpoint={"save": str(tmp_path / "half")})
    assert trainer(config).run() == FINISHED
    return tmp_path / "half"


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone() for stage in run.engine.modules for name, parameter in stage.named_parameters()
    }


def moments(run: Trainer) -> float:
    return sum(float(block.tensor.abs().sum()) for block in run.engine.optimizer.blocks())


def restored(corpus: Path, half: Path, **options: Any) -> Trainer:
    run = trainer(job(corpus, checkpoint={"load": str(half), **options}))
    run.restore()
    return run


def test_finetune_takes_the_weights_only(corpus: Path, half: Path) -> None:
    whole, tuned = restored(corpus, half), restored(corpus, half, finetune=True)
    fresh = trainer(job(corpus))
    assert weights(whole).keys() == weights(tuned).keys()
    for name, value in weights(whole).items():
        assert torch.equal(weights(tuned)[name], value)
    assert any(not torch.equal(weights(fresh)[name], value) for name, value in weights(whole).items())
    assert (tuned.step, tuned.loader.state_dict(), moments(tuned)) == (0, {"consumed_samples": 0}, 0.0)
    assert tuned.engine.optimizer.state_dict() == {"step_count": 0}
    assert (whole.step, whole.engine.optimizer.state_dict()) == (6, {"step_count": 6})
    assert tuned.run() == FINISHED


def test_no_load_optim_keeps_the_step_and_the_samples(corpus: Path, half: Path) -> None:
    whole, bare = restored(corpus, half), restored(corpus, half, no_load_optim=True)
    assert all(torch.equal(weights(bare)[name], value) for name, value in weights(whole).items())
    assert (bare.step, bare.loader.state_dict()) == (6, {"consumed_samples": 6 * GLOBAL_BATCH})
    assert moments(bare) == 0.0 < moments(whole)
    assert bare.engine.optimizer.state_dict() == {"step_count": 0}


def test_a_finished_run_has_nothing_left_to_do(corpus: Path, half: Path, tmp_path: Path) -> None:
    config = job(
        corpus,
        training={"train_iters": 6},
        checkpoint={"save": str(half), "load": "latest"},
        logging={"log_dir": str(tmp_path / "log")},
    )
    run = trainer(config)
    assert run.run() == FINISHED
    assert lines(tmp_path / "log") == [] and stored_steps(half) == [6]
