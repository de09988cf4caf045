"""A dense model made sparse says the same at first, and nothing is lost on the way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint.catalogue import open_place
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.errors import CheckpointError, ConfigError
from megatron_moe.models.load import load_model
from megatron_moe.models.upcycle import upcycle
from megatron_moe.models.whole import whole_logits
from megatron_moe.parallel.blocks import Block, module_blocks
from megatron_moe.parallel.state import ParallelState
from tests.checkpoint.samples import HastyStorage
from tests.inference.tiny_models import VOCAB, build, tiny_run
from tools import checkpoint

ALONE = ParallelState.alone()
MOE = {"num_experts": 4, "router_topk": 2, "layer_freq": "2"}


def save_dense(root: Path, blocks: list[Block] | None = None, experts: int = 0) -> Path:
    run = tiny_run({"num_experts": experts})
    writer = CheckpointWriter(root, ALONE.world, None, "run", HastyStorage(), background=False)
    found = module_blocks(build(run, ALONE), ALONE) if blocks is None else blocks
    writer.save(7, {"model": found}, {"step": 7, "vocab_size": VOCAB}, run.to_json(), {})
    return root


def logits_of(root: Path) -> torch.Tensor:
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return whole_logits(load_model(root).stages[0], tokens)[0]


@pytest.mark.parametrize(("topk", "freq"), [(2, "2"), (3, "1")])
def test_the_sparse_model_says_what_the_dense_one_said(topk: int, freq: str, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    upcycle(open_place(dense), tmp_path / "sparse", {**MOE, "router_topk": topk, "layer_freq": freq})
    before, after = logits_of(dense), logits_of(tmp_path / "sparse")
    assert before.std() > 0.5
    assert float((after - before).abs().max()) < 1e-6


def test_experts_are_copies_and_routers_are_new(tmp_path: Path) -> None:
    reader = open_place(save_dense(tmp_path / "dense"))
    upcycle(reader, tmp_path / "sparse", MOE)
    made = open_place(tmp_path / "sparse")
    sparse_layers = [layer for layer in range(4) if f"layers.{layer}.mlp.w1" not in made.names("model")]
    assert len(sparse_layers) == 2
    for layer in sparse_layers:
        for number in range(4):
            copy = made.logical(f"layers.{layer}.mlp.experts.{number}.w2")
            assert torch.equal(copy, reader.logical(f"layers.{layer}.mlp.w2"))
        assert made.logical(f"layers.{layer}.mlp.router.weight").std() > 0
    assert made.state["upcycled_from"].endswith("step_00000007")


def test_what_does_not_fit_is_refused_with_all_names(tmp_path: Path) -> None:
    blocks = module_blocks(build(tiny_run({"num_experts": 0}), ALONE), ALONE)
    wide = torch.zeros(16, 30, dtype=torch.float64)
    spoilt = [
        replace(block, tensor=wide, global_shape=(16, 30)) if block.name == "layers.1.mlp.w2" else block
        for block in blocks
        if block.name != "layers.1.mlp.w1"
    ]
    reader = open_place(save_dense(tmp_path / "dense", spoilt))
    with pytest.raises(CheckpointError) as caught:
        upcycle(reader, tmp_path / "sparse", MOE)
    told = str(caught.value)
    assert "layers.1.mlp.w1 is not there" in told
    assert told.count("layers.1.mlp.w2 is F64 [16, 30], needed F64 [16, 24]") == 1
    assert not (tmp_path / "sparse").exists()


def test_a_sparse_model_and_impossible_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a sparse model already, with --num-experts 4"):
        upcycle(open_place(save_dense(tmp_path / "sparse", experts=4)), tmp_path / "out", {**MOE, "num_experts": 8})
    reader = open_place(save_dense(tmp_path / "dense"))
    # one expert per token with a weight of 1 would leave the router without a gradient
    for wrong in ({"num_experts": 1}, {"router_topk": 5}, {"router_topk": 1}):
        with pytest.raises(ConfigError, match="--num-experts|--moe-router-topk"):
            upcycle(reader, tmp_path / "out", {**MOE, **wrong})


def test_the_command_says_how_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dense(tmp_path / "dense")
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "sparse"), "--num-experts", "4"]
    assert checkpoint.main(words) == 0
    assert "config.json --load" in capsys.readouterr().out
    assert checkpoint.main(words) == 2
