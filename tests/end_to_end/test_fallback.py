"""A job that comes back on fewer ranks takes a fallback layout: what it loads is what was saved, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.compare import differences
from megatron_moe.config.fallback import fit_world
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import grid_of
from megatron_moe.training.trainer import Trainer
from tests.end_to_end.commands import whole_checkpoint
from tests.end_to_end.tiny_job import CPU, GLOBAL_BATCH, attempt, job, read_steps, write_corpus

LAYOUT = {
    "tensor_model_parallel_size": 2,
    "expert_model_parallel_size": 4,
    "expert_tensor_parallel_size": 1,
    "fallback_layouts": ["ep=2", "tp=1"],
}


def restore_and_save(rank: int, world_size: int, text: str) -> int:
    """Goes on from a checkpoint, and saves before any step; returns the finished steps."""
    config = RunConfig.from_json(text)
    state = ParallelState.alone() if world_size == 1 else ParallelState.distributed(grid_of(config, world_size))
    trainer = Trainer(config, state, CPU)
    trainer.restore()
    trainer._save(last=True)
    trainer._finish_saving()
    return trainer.step


@pytest.mark.goal("R12", ci=2, nightly=2, what="fewer ranks, a fallback layout: same state, samples and loss")
def test_fewer_ranks_load_the_same_and_read_on(tmp_path: Path, trials: Trials) -> None:
    corpus = write_corpus(tmp_path / "tokens")
    router = {"router_type": "deepseek_v3", "aux_loss_coeff": 0.0}  # remembers a bias for each expert
    same: dict[str, Any] = {"moe": router, "precision": {"dtype": "fp64"}}
    (tmp_path / "alone").mkdir()
    assert run_on_ranks(1, attempt, job(corpus, **same).to_json(), str(tmp_path / "alone"), 0, None) == [0]
    expected = read_steps(tmp_path / "alone", 1)

    wide = {"save": str(tmp_path / "saved"), "load": "latest"}
    (tmp_path / "wide").mkdir()
    first = fit_world(job(corpus, parallel=LAYOUT, training={"exit_interval": 4}, checkpoint=wide, **same), 4)
    assert first.parallel.tensor_model_parallel_size == 2
    assert run_on_ranks(4, attempt, first.to_json(), str(tmp_path / "wide"), 0, None) == [0] * 4
    saved = whole_checkpoint(tmp_path / "saved")

    for ranks in (2, 1):
        folder = tmp_path / f"{ranks} ranks"
        folder.mkdir()
        fewer: dict[str, Any] = {"parallel": LAYOUT, **same}
        copy = job(corpus, checkpoint={"save": str(folder / "copy"), "load": str(tmp_path / "saved")}, **fewer)
        fitted = fit_world(copy, ranks)
        assert fitted.parallel.expert_model_parallel_size == ranks
        assert fitted.parallel.tensor_model_parallel_size == 1
        assert run_on_ranks(ranks, restore_and_save, fitted.to_json()) == [4] * ranks
        told = [line for line in differences(saved, whole_checkpoint(folder / "copy")) if " tensor " in line]
        assert told == []

        onward = fit_world(job(corpus, checkpoint={"load": str(tmp_path / "saved")}, **fewer), ranks)
        assert run_on_ranks(ranks, attempt, onward.to_json(), str(folder), 0, None) == [0] * ranks
        steps = read_steps(folder, ranks)
        assert [step.step for step in steps] == list(range(5, 13))
        for step, whole in zip(steps, expected[4:], strict=True):
            assert step.samples == whole.samples == list(range(whole.consumed - GLOBAL_BATCH, whole.consumed))
            assert step.loss == pytest.approx(whole.loss, rel=1e-9)
        trials.add(1)
