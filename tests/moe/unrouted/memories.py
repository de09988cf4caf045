"""Small memories for tests: ways of using each, and one built from fields of [moe]."""

from typing import Any

import torch
from layer_checks import ALONE, HIDDEN, make_layer

from megatron_moe.moe.unrouted.memory import MemoryLayer
from megatron_moe.parallel.state import ParallelState

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
    """As make_layer."""
    layer = make_layer(fields, hidden=hidden, state=state, dtype=dtype)
    assert isinstance(layer, MemoryLayer)
    return layer


def fill(layer: MemoryLayer, **tensors: Any) -> None:
    """Give parameters these values."""
    with torch.no_grad():
        for name, value in tensors.items():
            parameter = layer.get_parameter(name)
            parameter.copy_(torch.as_tensor(value, dtype=parameter.dtype).view(parameter.shape))


def plain(name: str, value: float) -> float:
    """An activation, once more."""
    if name == "relu":
        return max(value, 0.0)
    return value * 0.5 * (1.0 + float(torch.erf(torch.tensor(value / 2**0.5, dtype=torch.float64))))
