"""The words that router, limit and dispatcher share: a list of (token, expert, weight) assignments."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_moe.parallel.random import KeyedRandom


@dataclass(frozen=True)
class AuxLoss:
    """One auxiliary loss of one layer on this rank.

    share: () wide; the shares of all ranks in group_axis add up to the value summed over this microbatch's routing
    groups (per = "group"), its samples ("sequence") or its non-padding tokens ("token").  weight: its coefficient.
    The step's loss is Σ weight · shares / number of routing groups, of samples, or of such tokens in the global batch.
    """

    share: Tensor
    weight: float | Tensor  # a tensor where it is remembered and adapted
    per: str = "group"


@dataclass(frozen=True)
class TokenInfo:
    """What a rule may need to know of the tokens; each tensor (T,) int64 unless said."""

    ids: Tensor  # vocabulary ids, for hash routers
    previous_ids: Tensor  # the id before it in its document; -1 for the first
    positions: Tensor  # place in the sequence
    sequences: Tensor  # sample within the microbatch
    is_padding: Tensor  # bool
    groups: Tensor  # routing group within the microbatch
    keys: Tensor  # order within the group, the same on every layout: position-major, then sequence
    global_keys: Tensor  # unique in the run's sample order and passes: what random draws are keyed by
    sample_keys: Tensor  # the same for all tokens of a sample in one pass
    passes: Tensor  # 0, or 1 in the second of two passes over the same sample (THOR)
    num_groups: int
    group_size: int  # tokens of a whole group on all ranks, padding included
    group_tokens: Tensor  # (num_groups,) non-padding tokens of each whole group, on all ranks of group_axis
    sequence_tokens: Tensor  # (samples,) the same of each sample; `sequences` points into it
    sequence_groups: Tensor  # (samples,) the routing group of each
    sequence_keys: Tensor  # (samples,) sample_keys of each, whether or not this rank holds a token of it
    random: KeyedRandom  # (seed, step, "router", layer, pass)
    train: bool
    start: int = 0  # position of the first row of the sequences that are here (decoding)
    expert_keys: Tensor | None = None  # (E, H) wide: mean key of each expert, for routers that read them


@dataclass(frozen=True)
class RoutingPlan:
    """Who goes where: N assignments of local tokens to experts, in any order.

    expert_ids may hold num_experts, which means nobody (dropped, padding): such an assignment costs nothing.
    """

    num_tokens: int
    num_experts: int
    token_ids: Tensor  # (N,) int64 local row
    expert_ids: Tensor  # (N,) int64
    combine_weights: Tensor  # (N,) wide; weight of the expert's answer, carries the router's gradient
    priority: Tensor | None = None  # (N,) lower is served first; ties, and None, follow TokenInfo.keys
    confidence: Tensor | None = None  # (T,) detached: who is served first under batch-prioritised routing
    renormalise: bool = False  # what places leave of a token's weights is divided by its sum
    indivisible: bool = False  # a token's assignments, all in one pool of places, are served together, by one place
    aux_losses: dict[str, AuxLoss] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)  # detached; summed over step and ranks

    def mask(self) -> Tensor:
        """(T, E) bool: for tests and reports only."""
        table = torch.zeros(self.num_tokens, self.num_experts + 1, dtype=torch.bool, device=self.expert_ids.device)
        table[self.token_ids, self.expert_ids] = True
        return table[:, : self.num_experts]

    def tokens_per_expert(self) -> Tensor:
        """(E,) int64: assignments of each expert."""
        return self.expert_ids.bincount(minlength=self.num_experts + 1)[: self.num_experts]


def plan_from_choices(
    expert_ids: Tensor,
    weights: Tensor,
    info: TokenInfo,
    *,
    num_experts: int,
    k_major: bool = False,
    priority: Tensor | None = None,
    confidence: Tensor | None = None,
    renormalise: bool = False,
    aux_losses: dict[str, AuxLoss] | None = None,
    stats: dict[str, Tensor] | None = None,
) -> RoutingPlan:
    """The plan in which token t chose expert_ids[t, 0..K), best first.

    expert_ids: (T, K) int64, num_experts for an unused choice.   weights: (T, K) wide.   Padding tokens go to nobody.
    k_major: every token's first choice is served before any second one (GShard's order; sees the future).
    priority: (T, K) overrides both orders.   confidence, renormalise: as in RoutingPlan.
    """
    tokens, choices = expert_ids.shape
    device = expert_ids.device
    token_ids = torch.arange(tokens, device=device).repeat_interleave(choices)
    expert_ids = expert_ids.masked_fill(info.is_padding[:, None], num_experts)
    if priority is None and k_major:
        priority = torch.arange(choices, device=device).expand(tokens, choices)
    return RoutingPlan(
        num_tokens=tokens,
        num_experts=num_experts,
        token_ids=token_ids,
        expert_ids=expert_ids.reshape(-1),
        combine_weights=weights.reshape(-1),
        priority=None if priority is None else priority.reshape(-1),
        confidence=confidence,
        renormalise=renormalise,
        aux_losses=aux_losses or {},
        stats=stats or {},
    )


@dataclass(frozen=True)
class RoutingReport:
    """What an MoE layer says of one forward pass; the trainer sums reports and hands them back in after_step."""

    layer: int
    aux_losses: dict[str, AuxLoss]
    stats: dict[str, Tensor]  # detached

    @classmethod
    def of(cls, layer: int, requested: RoutingPlan, plan: RoutingPlan, info: TokenInfo) -> "RoutingReport":
        """requested: what the router asked for; plan: what the limit left of it."""
        asked = requested.tokens_per_expert()
        served = plan.tokens_per_expert()
        kept = plan.expert_ids < plan.num_experts
        reached = torch.zeros(plan.num_tokens, dtype=torch.bool, device=kept.device)
        reached[plan.token_ids[kept]] = True
        stats = {
            "requested": asked,
            "tokens_per_expert": served,
            "tokens": (~info.is_padding).sum(),
            "tokens_unserved": (~reached & ~info.is_padding).sum(),
            **requested.stats,
        }
        return cls(layer, requested.aux_losses, stats)
