"""One set of tokens for other people's routers and ours, float64, and what becomes of ours after places ran out."""

import torch
from moe_rows import NOBODY, make_router, token_info, weights_of
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.capacity import make_limit
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.moe.routers.router import Router

TOKENS, HIDDEN, EXPERTS = 24, 6, 4


def tokens_and_weight(seed: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """(T, H) and (E, H)."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, HIDDEN, generator=draw, dtype=torch.float64)
    return rows, torch.randn(EXPERTS, HIDDEN, generator=draw, dtype=torch.float64)


def router_with(config: MoEConfig, weight: Tensor) -> Router:
    router = make_router(config, weight.shape[1])
    with torch.no_grad():
        router.get_parameter("weight").copy_(weight)
    return router


def decide(config: MoEConfig, tokens: Tensor, weight: Tensor, *, train: bool = True) -> RoutingPlan:
    """What our router asks for and the limit leaves, in one routing group."""
    router = router_with(config, weight)
    info = token_info(len(tokens), train=train)
    return make_limit(config, router.choices(config), NOBODY, router.expert_pools)(router(tokens, info), info)


def table_of(plan: RoutingPlan) -> Tensor:
    """(T, E) the weight of each expert for each token."""
    table = torch.zeros(plan.num_tokens, plan.num_experts, dtype=torch.float64)
    for (token, expert), weight in weights_of(plan).items():
        table[token, expert] = weight
    return table
