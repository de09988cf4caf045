"""A whole sparse layer on one process around a router: real experts, real dispatch."""

from dataclasses import replace

import torch
from layers.contexts import context, make
from torch import Tensor, nn

from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.capacity import make_limit
from megatron_moe.moe.dispatch.local import LocalDispatcher
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.routers.router import Router
from megatron_moe.parallel.state import ParallelState

ALONE = ParallelState.alone()


def layer_of(router: Router, *, ffn_size: int, activation: str) -> MoELayer:
    """The layer in float64, its weights about as large as its tokens."""
    config = router.config
    experts = Experts(
        config.num_experts,
        router.hidden_size,
        ffn_size,
        activation,
        ALONE.ep,
        ALONE.etp,
        init_std=0.5,
        output_std=0.5,
        dtype=torch.float64,
    )
    limit = make_limit(config, router.choices(config), ALONE.tp_cp, router.expert_pools)
    dispatcher = LocalDispatcher(config.num_experts, ALONE.ep, ALONE.etp)
    layer = MoELayer(0, router, limit, dispatcher, experts, None, ALONE.tp, config.routing_group_samples)
    make(nn.ModuleDict({"experts": experts}), ALONE)
    return layer


def run_layer(layer: MoELayer, hidden: Tensor, *, tokens: Tensor | None = None, train: bool = True) -> Tensor:
    """hidden, and the answer: (S, B, H).   tokens: (S, B) vocabulary ids."""
    plain = context(hidden.shape[0], hidden.shape[1], ALONE)
    view = plain.view if tokens is None else replace(plain.view, tokens=tokens)
    return layer(hidden, ForwardContext(view, plain.random, train=train, sequence_parallel=False)).hidden
