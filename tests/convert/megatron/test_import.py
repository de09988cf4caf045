"""Checkpoints that megatron-core 0.16.1 wrote, on several layouts and in both formats, give megatron-core's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.config.run import RunConfig
from megatron_moe.convert.megatron.import_ import MegatronOptions, import_megatron
from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.models.whole import whole_logits
from megatron_moe.parallel.blocks import module_blocks
from megatron_moe.parallel.state import ParallelState

GOLDEN = Path(__file__).parents[2] / "golden" / "megatron"
ALLOWED = MegatronOptions(allow_pickle=True)
STATE = ParallelState.alone()
# both sides compute in float32, in another order
TOLERANCE = 1e-5
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and "-" in path.name)


def our_logits(root: Path, run: RunConfig, tokens: torch.Tensor) -> torch.Tensor:
    vocab_size = run.model.vocab_size
    assert vocab_size is not None
    (stage,) = stages = build_stages(gpt_spec(run, vocab_size), STATE)
    initialise_stages(stages, STATE, 5, torch.device("cpu"))
    find_checkpoint(root, None, STATE.world).fill(module_blocks([stage], STATE))
    return whole_logits(stage.eval(), tokens)[0]


@pytest.mark.parametrize("case", CASES)
def test_our_model_gives_the_logits_of_megatron_core(case: str, tmp_path: Path) -> None:
    run = import_megatron(GOLDEN / case, tmp_path / "ckpt", ALLOWED)
    expected = load_file(GOLDEN / f"{case.split('-')[0]}.safetensors")
    logits = our_logits(tmp_path / "ckpt", run, expected["tokens"])
    theirs = expected["logits"][..., : logits.shape[-1]]
    assert run.model.vocab_size == 43 < expected["logits"].shape[-1]
    assert float(theirs.std()) > 0.1
    assert float((logits - theirs).abs().max()) < TOLERANCE * float(theirs.abs().max())
    assert not list(tmp_path.glob(".megatron-import-*"))
