"""Soft MoE and SMEAR for tests: built from fields of [moe], and what they answer to tokens."""

from typing import Any

import layer_checks
import torch
from layer_checks import ALONE, HIDDEN
from layers.contexts import context
from torch import Tensor

from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.unrouted_layer import UnroutedLayer

EXPERTS = 3


def make_layer(name: str, **fields: Any) -> UnroutedLayer:
    """Three experts of width 5."""
    small = {"num_experts": EXPERTS, "ffn_hidden_size": 5, "activation": "relu"}
    return layer_checks.make_layer({**small, "router_type": name, **fields})


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
