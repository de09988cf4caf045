"""The plan of experts that chose their tokens: for every rule in which an expert, not a token, has the choice."""

import torch
from torch import Tensor

from megatron_moe.moe.plan import AuxLoss, RoutingPlan


def plan_from_takers(
    scores: Tensor, rows: Tensor, taken: Tensor, *, aux_losses: dict[str, AuxLoss], stats: dict[str, Tensor]
) -> RoutingPlan:
    """The plan in which expert e of group g takes token rows[g, e, c], with its raw score as weight.

    scores: (T, E) wide, of this rank's tokens, with gradient.   rows: (G, E, C) int64 local rows; one outside 0..T-1 is
    another rank's, and nobody's here.   taken: (G, E, C) bool: False for a place that stays empty.
    """
    num_tokens, num_experts = scores.shape
    if not num_tokens:
        rows, taken = rows[..., :0], taken[..., :0]
    mine = taken & (rows >= 0) & (rows < num_tokens)
    rows = rows.masked_fill(~mine, 0)
    experts = torch.arange(num_experts, device=rows.device)[None, :, None].expand_as(rows)
    return RoutingPlan(
        num_tokens=num_tokens,
        num_experts=num_experts,
        token_ids=rows.reshape(-1),
        expert_ids=experts.masked_fill(~mine, num_experts).reshape(-1),
        combine_weights=scores[rows, experts].masked_fill(~mine, 0.0).reshape(-1),
        aux_losses=aux_losses,
        stats=stats,
    )
