"""What needs the registries to be checked: still before any rank joins."""

import torch

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.routers.registry import build_router, find_router
from megatron_moe.parallel.state import ParallelState


def validate(config: RunConfig) -> list[str]:
    """Raises ConfigError for a router that is unknown, is told what it does not know, or sees the future.

    Returns notes for the log.
    """
    if not any(config.moe.moe_layers(config.model.num_layers)):
        return []
    moe = config.moe
    router = find_router(moe.router_type)
    build_router(moe, config.model.hidden_size, ParallelState.alone().tp_cp, torch.float32, config.model.init_method_std)
    if router.is_causal:
        return []
    if not moe.allow_noncausal:
        raise ConfigError(
            f"--moe-router-type {moe.router_type} looks at later tokens of a sequence, which a causal decoder must not; "
            f"use a causal router (top_k, switch, gshard, st_moe), or --moe-allow-noncausal to train one that leaks."
        )
    return [f"router {moe.router_type} sees later tokens: training losses of this model are not comparable to causal ones"]
