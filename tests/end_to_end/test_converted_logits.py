"""The project's model and the library's give the same logits for the same weights, in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.config.run import RunConfig
from megatron_moe.convert.export import ExportOptions, export_model
from megatron_moe.convert.import_ import import_folder
from megatron_moe.convert.registry import FAMILIES
from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.models.gpt import GPTStage
from megatron_moe.moe.plan import RoutingReport
from megatron_moe.parallel.blocks import module_blocks
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import ParallelState
from tests.convert.samples import VOCAB, MemorySource, library_model, load_strictly, run_of

STATE = ParallelState.alone()
CPU = torch.device("cpu")
LENGTH, SAMPLES = 64, 5  # 320 tokens
# both sides compute in float32, in another order; logits are of size one, a rounding is 6e-8
TOLERANCE = 1e-5

ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("olmoe", {}),
    ("olmoe", {"router_options": {"renormalise": "true"}}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"router_type": "switch"}),
    ("qwen3_moe", {"router_type": "gshard"}),
    ("qwen3_moe", {"router_type": "gshard", "router_options": {"renormalise": "none"}}),
    ("qwen3_moe", {"router_type": "st_moe", "router_topk": 3, "router_options": {"eval_policy": "all"}}),
]


@dataclass(frozen=True)
class Answer:
    logits: Tensor  # (B, S, V)
    reports: list[RoutingReport]


def random_tokens() -> Tensor:
    """(B, S)."""
    return torch.randint(VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(3))


def build(run: RunConfig) -> GPTStage:
    """The whole model on one rank, with random values in every parameter."""
    (stage,) = stages = build_stages(gpt_spec(run, VOCAB), STATE)
    initialise_stages(stages, STATE, 5, CPU)
    made = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=made) * 0.2)
    return stage


@torch.no_grad()
def our_answer(stage: GPTStage, tokens: Tensor) -> Answer:
    samples, length = tokens.shape
    view = SequenceView(
        tokens=tokens.t(),
        positions=torch.arange(length)[:, None].expand(length, samples),
        segments=torch.zeros(length, samples, dtype=torch.int32),
        sample_ids=torch.arange(samples),
        rows=torch.arange(length),
        segmented=False,
    )
    output = stage.eval()({}, ForwardContext(view, KeyedRandom(11), train=False, sequence_parallel=False))
    return Answer(output.tensors["logits"][..., :VOCAB].transpose(0, 1), output.reports)


@torch.no_grad()
def their_logits(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "moe"), ROUTERS)
def test_library_repeats_the_logits_of_an_exported_model(
    family: str, moe: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    run = run_of(family, moe=moe, model={"untie_embeddings_and_output_weights": not tied})
    stage, tokens = build(run), random_tokens()
    answer = our_answer(stage, tokens)
    source = MemorySource({block.name: block.tensor for block in module_blocks([stage], STATE)})
    export_model(source, run, tmp_path / "hf", options=ExportOptions(model_type=family), where="the model")
    theirs = their_logits(load_strictly(tmp_path / "hf"), tokens)
    assert theirs.std() > 0.5
    assert float((answer.logits - theirs).abs().max()) < TOLERANCE
    assert len(answer.reports) == 2
    for report in answer.reports:
        assert int(report.stats["tokens_per_expert"].min()) > 0


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_imported_model_repeats_the_logits_of_the_library(family: str, tmp_path: Path) -> None:
    model, tokens = library_model(family), random_tokens()
    model.save_pretrained(tmp_path / "library")
    run = import_folder(tmp_path / "library", tmp_path / "ckpt")
    stage = build(run)
    find_checkpoint(tmp_path / "ckpt", None, STATE.world).fill(module_blocks([stage], STATE))
    theirs = their_logits(model, tokens)
    assert float((our_answer(stage, tokens).logits - theirs).abs().max()) < TOLERANCE
