"""What needs the registries to be checked: still before any rank joins."""

import torch

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.capacity import limit_is_causal
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
    build_router(
        moe, config.model.hidden_size, ParallelState.alone().tp_cp, torch.float32, config.model.init_method_std
    )
    if not router.is_causal:
        problem = f"--moe-router-type {moe.router_type}"
        instead = "use a causal router (top_k, switch, gshard, st_moe)"
    elif not limit_is_causal(moe, router.choices(moe)):
        problem = f"--moe-token-drop-policy {moe.token_drop_policy} with --moe-slot-priority {moe.slot_priority}"
        instead = "drop by position in token_major order"
    else:
        return []
    if not moe.allow_noncausal:
        raise ConfigError(
            f"{problem} looks at later tokens of a sequence, which a causal decoder must not; {instead}, or give "
            f"--moe-allow-noncausal to train a model that leaks."
        )
    return [f"{problem} sees later tokens: losses of this model are not comparable to those of causal ones"]
