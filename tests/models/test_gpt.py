"""The decoder-only family in stages: names, shapes, edges, and the same logits however it is cut."""

from typing import Any

import pytest
import torch

from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.models.gpt import GPTStage
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import layout_of, logical_pieces
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.partition import parts_of
from tests.config.example import sparse
from tests.layers.contexts import context

CPU = torch.device("cpu")
VOCAB = 200
# layers 1 and 3 of 4 are sparse; 8 heads of width 8; 200 ids padded to 256
CHANGES: dict[str, Any] = {
    "model.num_query_groups": 4,
    "model.ffn_hidden_size": 96,
    "model.qk_layernorm": "head",
    "moe.layer_freq": "2",
    "moe.ffn_hidden_size": 48,
    "moe.shared_expert_intermediate_size": 32,
    "moe.shared_expert_gate": True,
    "precision.dtype": "fp64",
}
NORMS = {"attention_norm.weight": (64,), "mlp_norm.weight": (64,)}
ATTENTION = {
    "attention.qkv": (4, 4, 8, 64),
    "attention.output": (64, 4, 2, 8),
    "attention.q_norm.weight": (8,),
    "attention.k_norm.weight": (8,),
}
DENSE = {"mlp.w1": (2, 96, 64), "mlp.w2": (64, 96)}
SPARSE = {
    "mlp.router.weight": (8, 64),
    "mlp.shared_expert.w1": (2, 32, 64),
    "mlp.shared_expert.w2": (64, 32),
    "mlp.shared_expert.gate": (1, 64),
    **{f"mlp.experts.{expert}.w1": (2, 48, 64) for expert in range(8)},
    **{f"mlp.experts.{expert}.w2": (64, 48) for expert in range(8)},
}


def expected(*, tied: bool) -> dict[str, tuple[int, ...]]:
    """Every logical tensor of the model and its whole shape."""
    found: dict[str, tuple[int, ...]] = {"embedding.weight": (256, 64), "final_norm.weight": (64,)}
    if not tied:
        found["output.weight"] = (256, 64)
    for layer in range(4):
        parts = {**NORMS, **ATTENTION, **(SPARSE if layer % 2 else DENSE)}
        found |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    return found


def stages_of(
    changes: dict[str, Any], grid: Grid, rank: int, parts: list[range] | None = None
) -> tuple[list[GPTStage], ParallelState]:
    state = ParallelState.recorded(grid, rank)[0]
    return build_stages(gpt_spec(sparse({**CHANGES, **changes}), VOCAB), state, parts), state


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("grid", [Grid(1), Grid(2, pp=2), Grid(8, tp=2, pp=2, ep=4), Grid(4, ep=2, etp=2)], ids=str)
def test_the_ranks_together_hold_the_named_tensors_and_no_others(grid: Grid, untied: bool) -> None:
    changes = {"model.untie_embeddings_and_output_weights": untied}
    held: dict[str, int] = {}
    for rank in range(grid.world_size):
        stages, state = stages_of(changes, grid, rank)
        for stage in stages:
            for name, parameter in stage.named_parameters():
                layout = layout_of(parameter)
                for piece in logical_pieces(name, layout, state):
                    assert piece.global_shape == expected(tied=not untied)[piece.name]
                    assert parameter.is_meta
                    if layout.is_primary(state):
                        held[piece.name] = held.get(piece.name, 0) + torch.Size(piece.shape).numel()
    assert held == {name: torch.Size(shape).numel() for name, shape in expected(tied=not untied).items()}


def logits(changes: dict[str, Any], num_stages: int, parts: list[range] | None = None) -> torch.Tensor:
    """All stages one after another in this process; each is one rank of its own pipeline.   parts: all on one rank."""
    tensors: dict[str, torch.Tensor] = {}
    ctx = context(12, 2, ParallelState.alone())
    for rank in range(num_stages):
        stages, state = stages_of(changes, Grid(num_stages, pp=num_stages), rank, parts)
        initialise_stages(stages, state, 3, CPU)
        for stage in stages:
            if tensors:
                edge = stage.edge(stage.number, ctx)
                assert {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()} == edge
            output = stage(tensors, ctx)
            tensors = output.tensors
            assert [report.layer for report in output.reports] == list(stage.moe_layers())
    return tensors["logits"].detach()


@pytest.mark.parametrize("untied", [False, True])
def test_any_number_of_stages_gives_the_same_logits_bit_by_bit(untied: bool) -> None:
    changes = {"model.untie_embeddings_and_output_weights": untied}
    whole = logits(changes, 1)
    assert whole.shape == (12, 2, 256) and whole.dtype == torch.float64
    for num_stages in (2, 3, 4):
        assert torch.equal(logits(changes, num_stages), whole)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (0, 1, 3, 0), (2, 0, 2)], ids=str)
def test_stages_without_layers_pass_on_what_they_are_given(sizes: tuple[int, ...], untied: bool) -> None:
    changes = {"model.untie_embeddings_and_output_weights": untied}
    assert torch.equal(logits(changes, 1, parts_of(sizes)), logits(changes, 1))


def test_a_rank_has_every_so_many_th_stage_and_shares_what_they_have_in_common() -> None:
    parts = parts_of((0, 1, 2, 1, 0, 0))
    state, _ = ParallelState.recorded(Grid(2, pp=2, rounds=3), 1)
    stages = build_stages(gpt_spec(sparse(CHANGES), VOCAB), state, parts)
    assert [stage.number for stage in stages] == [1, 3, 5]
    assert [list(stage.layers) for stage in stages] == [["0"], ["3"], []]
    stages = build_stages(gpt_spec(sparse(CHANGES), VOCAB), ParallelState.alone(), parts)
    initialise_stages(stages, ParallelState.alone(), 3, CPU)
    first, last = stages[0], stages[-1]
    assert first.get_parameter("embedding.weight") is last.get_parameter("embedding.weight")
    assert not hasattr(stages[1], "embedding")


def test_another_seed_or_name_gives_other_weights() -> None:
    (stage,), state = stages_of({}, Grid(1), 0)
    initialise_stages([stage], state, 3, CPU)
    first, second = (stage.get_parameter(f"layers.{layer}.attention.qkv") for layer in (0, 1))
    assert not torch.equal(first, second)
    assert float(first.detach().std()) == pytest.approx(0.02, rel=0.05)
    # residual branches start smaller by the root of twice the depth
    assert float(stage.get_parameter("layers.0.mlp.w2").detach().std()) == pytest.approx(0.02 / 8**0.5, rel=0.05)


def test_the_edge_of_a_sequence_parallel_rank_is_its_share_of_the_rows() -> None:
    for rank, rows in ((0, 3), (1, 2)):
        stages, state = stages_of({"parallel.tensor_model_parallel_size": 2}, Grid(4, tp=2, pp=2), rank)
        ctx = context(5, 3, state, sequence_parallel=True)
        assert stages[0].edge(1, ctx) == {"hidden": ((rows, 3, 64), torch.float64)}
        assert stages[0].edge(1, context(5, 3, state)) == {"hidden": ((5, 3, 64), torch.float64)}


def test_layer_norm_brings_biases_and_a_dense_model_no_experts() -> None:
    (stage,), _ = stages_of({"model.normalization": "LayerNorm"}, Grid(1), 0)
    names = {name for name, _ in stage.named_parameters()}
    assert {"final_norm.bias", "layers.2.attention_norm.bias", "layers.3.mlp_norm.bias"} <= names
    assert list(stage.moe_layers()) == [1, 3]
