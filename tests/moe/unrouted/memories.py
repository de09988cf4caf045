"""Small memories for tests: one built from fields of [moe], on one process or on a rank, and what it answers."""

from typing import Any

import torch
from layers.contexts import context
from moe_rows import token_info
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_unrouted
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.memory import MemoryLayer
from megatron_moe.moe.unrouted.unrouted_layer import LayerSite, Mixed
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.state import ParallelState

HIDDEN = 6
ALONE = ParallelState.alone()

# four experts of width 4: 16 cells, which are a square
RELU = {"activation": "relu"}
CASES: dict[str, dict[str, Any]] = {
    "vanilla_memory": {"router_type": "vanilla_memory", "router_topk": 1, **RELU},
    "vanilla_memory, 7 cells": {
        "router_type": "vanilla_memory",
        "activation": "gelu",
        "router_options": {"active_cells": "7"},
    },
    "low_rank_keys": {
        "router_type": "low_rank_keys",
        "activation": "gelu",
        "router_options": {"rank": "3", "active_cells": "3"},
    },
    "product_keys": {"router_type": "product_keys", "router_options": {"heads": "2", "key_dim": "4", "knn": "3"}},
    "product_keys, batch": {
        "router_type": "product_keys",
        "routing_group_samples": 2,
        "router_options": {"heads": "2", "key_dim": "4", "query_norm": "batch"},
    },
    "product_keys, 36 cells": {
        "router_type": "product_keys",
        "router_topk": 1,
        "router_options": {"heads": "3", "key_dim": "2", "num_subkeys": "6", "query_norm": "none"},
    },
    "product_keys_ffn": {"router_type": "product_keys_ffn", "activation": "gelu", "router_options": {"key_dim": "4"}},
    "controller": {
        "router_type": "controller",
        "router_topk": 1,
        "activation": "gelu",
        "router_options": {"rank": "3"},
    },
    "controller, no noise": {
        "router_type": "controller",
        "activation": "relu",
        "router_options": {"rank": "2", "gumbel_noise": "false", "temperature": "0.7", "active_cells": "8"},
    },
}


def make_memory(
    fields: dict[str, Any], *, hidden: int = HIDDEN, state: ParallelState = ALONE, dtype: torch.dtype = torch.float64
) -> MemoryLayer:
    """With its first weights, about as large as tokens are; the same on every layout."""
    options = fields.get("router_options", {})
    width = {} if "num_subkeys" in options or "ffn_hidden_size" in fields else {"ffn_hidden_size": 4}
    config = MoEConfig(num_experts=4, **{**width, **fields})
    site = LayerSite(
        index=0,
        hidden_size=hidden,
        ffn_size=config.ffn_hidden_size or 4,
        activation=config.activation or "swiglu",
        init_std=0.5,
        output_std=0.5,
        dtype=dtype,
        state=state,
    )
    layer = build_unrouted(config, site)
    assert isinstance(layer, MemoryLayer)
    materialise(layer, state, 7, torch.device("cpu"))
    return layer


def fill(layer: MemoryLayer, **tensors: Any) -> None:
    """Give parameters these values."""
    with torch.no_grad():
        for name, value in tensors.items():
            parameter = layer.get_parameter(name)
            parameter.copy_(torch.as_tensor(value, dtype=parameter.dtype).view(parameter.shape))


def ask(layer: MemoryLayer, tokens: Tensor, info: TokenInfo | None = None, *, train: bool = True) -> Mixed:
    """tokens: (T, H), without further word one sample."""
    info = info or token_info(tokens.shape[0], train=train)
    return layer.mix(tokens, info, context(1, 1, ALONE))


def draw(rows: int, seed: int = 0, *, hidden: int = HIDDEN) -> Tensor:
    """(rows, H) normal."""
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(name: str, value: float) -> float:
    """An activation, once more."""
    if name == "relu":
        return max(value, 0.0)
    return value * 0.5 * (1.0 + float(torch.erf(torch.tensor(value / 2**0.5, dtype=torch.float64))))
