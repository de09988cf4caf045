"""A world of 1,024 ranks in one process, a model of 269 billion parameters on no memory."""

from pathlib import Path

import pytest
import torch
from planning.models import ENCODER_DECODER, VOCAB, small

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.state import ParallelState
from megatron_moe.planning import dry_run as module
from megatron_moe.planning.dry_run import dry_run
from megatron_moe.training.engine import Engine, grid_of
from tools.dry_run import main

ST_MOE = Path(__file__).parents[2] / "examples" / "st_moe" / "st_moe_32b.toml"


@pytest.mark.timeout(600)
def test_st_moe_32b_on_1024_ranks() -> None:
    config = RunConfig.load(["--config", str(ST_MOE)])
    report = dry_run(config, grid_of(config, 1024), 32128)
    assert report.problems == ()
    assert report.coverage.parameters == 269_104_613_376
    # twelve layers of 64 experts with two matrices each; everything else is counted by layers
    experts = 12 * 64 * 2
    assert report.coverage.tensors > experts
    # an expert of edp 4 copies; a rank has one of each sparse layer
    assert report.coverage.copies > 4 * experts
    assert report.transfers == 2 * 8 * 3  # there and back, of 8 microbatches
    # by hand: 0.5 + 0.63 B and 1.97 + 1.89 B parameters of a rank; 5.8 and 20.0 GB of gradients and weights in a step
    for stage, parameters, traffic in ((report.stages[0], 1.13e9, 5.8e9), (report.stages[3], 3.86e9, 20.0e9)):
        assert stage.parameters == pytest.approx(parameters, rel=0.01)
        assert stage.sent["dp_cp"] + stage.sent["edp"] == pytest.approx(traffic, rel=0.01)
    for stage in report.stages:
        # bf16 weights, float32 gradients; masters and two moments of a shard
        assert stage.gradients == pytest.approx(2 * stage.weights, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("sharded", [True, False])
def test_the_memory_of_a_rank_is_what_an_engine_takes(dtype: str, sharded: bool) -> None:
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4}
    tables = {**ENCODER_DECODER, "precision": {"dtype": dtype}}
    config = small(tables, {**parallel, "use_distributed_optimizer": sharded})
    grid = grid_of(config, 16)
    report = dry_run(config, grid, VOCAB)
    assert report.problems == ()
    for place, stage in enumerate(report.stages):
        state, _ = ParallelState.recorded(grid, place * grid.stage_size)
        engine = Engine(config, state, torch.device("cpu"), VOCAB)
        buckets = engine.buckets.buckets
        kept = {block.tensor.untyped_storage().data_ptr(): block.tensor for block in engine.optimizer.blocks()}
        assert stage.weights == sum(bucket.weights.nbytes for bucket in buckets)
        assert stage.gradients == sum(bucket.gradients.nbytes for bucket in buckets)
        assert stage.optimizer == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        assert stage.parameters == sum(weight.numel() for part in engine.stages for weight in part.parameters())
    # nobody sends along an axis of one rank
    assert all("cp" not in stage.sent for stage in report.stages)
    # the encoder's output, and its gradient, of 16 microbatches
    assert report.transfers == 2 * 16


def test_a_formula_that_disagrees_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "parameters", lambda config, vocab_size: {"all": 7})
    config = small({})
    assert any("by formula 7" in problem for problem in dry_run(config, grid_of(config, 2), VOCAB).problems)


def test_a_world_that_does_not_fit_is_refused() -> None:
    config = small({}, {"pipeline_model_parallel_size": 4})
    with pytest.raises(ConfigError, match="3 data-parallel ranks"):
        dry_run(config, grid_of(config, 4 * 3), VOCAB)


def test_the_command_prints_stages_and_takes_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, report = tmp_path / "run.json", tmp_path / "report.json"
    recipe.write_text(small(ENCODER_DECODER).to_json())
    flags = ["--recipe", str(recipe), "--world-size", "8", "--json", str(report)]
    assert main([*flags, "--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "8 ranks: tp 1, cp 1, pp 2, dp 4, ep 4, etp 1, edp 1" in out and "0 problems" in out
    assert "| 0-3 |" in out and report.exists()
    assert main([*flags, "--pipeline-model-parallel-size", "3"]) == 2
    assert "cannot be shared out" in capsys.readouterr().err
