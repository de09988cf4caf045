"""With --debug-collectives a run computes the same, bit for bit; and a rank that leaves out a collective is named."""

from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from ranks import run_on_ranks

from megatron_moe.config.errors import PeerError
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.checked import Checked
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training import engine
from megatron_moe.training.engine import StepResult, grid_of
from megatron_moe.training.trainer import FINISHED, Trainer
from tests.end_to_end.tiny_job import CPU, job, state_hash, write_corpus

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
CP, VPP, SCHEDULE = "context_parallel_size", "num_virtual_stages_per_pipeline_rank", "pipeline_schedule"
CHECKS = timedelta(seconds=300)
# all that travels in other ways: in pieces, beside computing, round a ring, between stages
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 2 in pieces, EP 2, DP 2": (4, {TP: 2, EP: 2, "tp_comm_overlap": True}),
    "PP 2 of two stages, EP 2": (4, {PP: 2, VPP: 2, EP: 2}),
    "PP 2 in halves": (2, {PP: 2, SCHEDULE: "zb_h1"}),
    "CP 2 in a ring, DP 2": (4, {CP: 2, "cp_comm_type": "p2p"}),
    "EP 2 beside another micro-batch": (2, {EP: 2, SCHEDULE: "1f1b_overlap"}),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def whole_run(trainer: Trainer) -> tuple[list[float], str]:
    """The loss of each step, and a hash of all that is left."""
    losses: list[float] = []
    train = trainer.train_step

    def watched() -> StepResult:
        result = train()
        losses.append(result.metrics.loss)
        return result

    trainer.train_step = watched  # type: ignore[method-assign]
    assert trainer.run() == FINISHED
    return losses, state_hash(trainer)


def both(rank: int, world_size: int, texts: list[str]) -> list[tuple[list[float], str]]:
    """A run with the comparison, and one without."""
    found = []
    for text, checks in zip(texts, (CHECKS, None), strict=True):
        config = RunConfig.from_json(text)
        state = ParallelState.distributed(grid_of(config, world_size), checks=checks)
        assert isinstance(state.world.comm, Checked) == (checks is not None)
        found.append(whole_run(Trainer(config, state, CPU)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_comparison_changes_nothing(layout: str, corpus: Path, tmp_path: Path) -> None:
    """Nor does it see anything wrong in a run that also evaluates and saves."""
    world_size, parallel = LAYOUTS[layout]
    changes: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 4},
        "training": {"global_batch_size": 8, "train_iters": 2, "eval_interval": 2, "eval_iters": 1},
        "optimizer": {"lr_warmup_iters": 1},
    }
    folders = [{"save": str(tmp_path / name), "save_interval": 1} for name in ("compared", "without")]
    texts = [job(corpus, parallel=parallel, **changes, checkpoint=saving).to_json() for saving in folders]
    for compared, without in run_on_ranks(world_size, both, texts):
        assert len(compared[0]) == 2 and compared == without


def forgetful(rank: int, world_size: int, text: str) -> tuple[str, int]:
    """A run whose rank 2 leaves out the sum of the gradient norm in its third step."""
    config = RunConfig.from_json(text)
    trainer = Trainer(config, ParallelState.distributed(grid_of(config, world_size), checks=CHECKS), CPU)
    for _ in range(2):
        trainer.train_step()
    try:
        with patch.object(engine, "clip_", (lambda *_: 1.0) if rank == 2 else engine.clip_):
            trainer.train_step()
    except PeerError as error:
        return str(error), error.exit_code
    return "", 0


def test_a_rank_that_leaves_out_a_collective_ends_the_run_of_all(corpus: Path) -> None:
    answers = run_on_ranks(3, forgetful, job(corpus, training={"global_batch_size": 6}).to_json())
    assert len(set(answers)) == 1
    told, code = answers[0]
    assert code == 86 and "on axis world: ranks [2] are out of step: they are elsewhere in the program" in told
    assert "rank 0: world: all_reduce sum of float64 () at optim/clip.py:" in told
    assert "rank 2: world: all_reduce sum of" in told and "at training/metrics.py:" in told
