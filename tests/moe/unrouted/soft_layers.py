"""Soft MoE and SMEAR for tests: built from fields of [moe], and what they answer to tokens."""

from typing import Any

import torch
from layers.contexts import context
from torch import Tensor, nn

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_unrouted
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.unrouted_layer import LayerSite, UnroutedLayer
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.state import ParallelState

ALONE = ParallelState.alone()
HIDDEN, WIDTH, EXPERTS = 6, 5, 3


def make_layer(name: str, *, state: ParallelState = ALONE, **fields: Any) -> UnroutedLayer:
    """Three experts, weights about as large as tokens are."""
    config = MoEConfig(num_experts=EXPERTS, router_type=name, **fields)
    site = LayerSite(
        index=0,
        hidden_size=HIDDEN,
        ffn_size=WIDTH,
        activation="relu",
        init_std=0.6,
        output_std=0.6,
        dtype=torch.float64,
        state=state,
    )
    layer = build_unrouted(config, site)
    materialise(nn.ModuleDict({"mlp": layer}), state, 7, torch.device("cpu"))
    return layer


def answers(layer: UnroutedLayer, tokens: Tensor, info: TokenInfo, *, samples: int) -> Tensor:
    """(T, H)."""
    length = len(tokens) // max(1, samples)
    return layer.mix(tokens, info, context(length, samples, ALONE)).answers


def draw(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def expert_by_hand(layer: Any, expert: int, row: Tensor) -> Tensor:
    """ReLU(W1 x) then W2."""
    found: Tensor = layer.experts.w2[expert] @ torch.relu(layer.experts.w1[expert, 0] @ row)
    return found
