"""Places at the experts: who is over his routing group's capacity goes to nobody, before anything moves.

A limit is a pure function of the plan, and the same decision on every layout: where sequence or context parallelism
cuts a group, its assignments are compared with those of the other ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from megatron_moe.config.moe import PLACES, MoEConfig
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.parallel.collectives import gather_counts
from megatron_moe.parallel.state import Axis

# fields of MoEConfig that say nothing to a rule which fills its experts evenly by itself
FILLED = ("router_pre_softmax", "aux_loss_coeff", "expert_capacity_factor", *PLACES)

Limit = Callable[[RoutingPlan, TokenInfo], RoutingPlan]


@dataclass(frozen=True)
class _Waiting:
    """Who waits for a place: each of N assignments, or each of N tokens with all of its assignments."""

    token_ids: Tensor  # (N,) int64 local row
    pools: Tensor  # (N,) int64; the number of pools means nobody's
    urgency: list[Tensor]  # (N,) each: sorted by, lowest first, before the order in the sequence


def make_limit(config: MoEConfig, num_choices: int, group_axis: Axis, pools: int | None = None) -> Limit:
    """The limit of one layer, from the config's capacity factors; without one it returns the plan as it is.

    num_choices: the router's choices per token, which count when config.capacity_includes_k.   group_axis: the ranks
    that share routing groups (tp_cp).   pools: runs of equally many experts that share their places; None: each expert
    has its own.  A pool has places for the num_choices assignments of its part of the tokens, one for each assignment
    (DeepSeek-V2), or, when the plan is indivisible, one for each token (SAM).
    """
    train_factor, eval_factor = _factors(config)
    choices = num_choices if config.capacity_includes_k and pools is None else 1
    per_pool = 1 if pools is None else config.num_experts // pools

    def limit(plan: RoutingPlan, info: TokenInfo) -> RoutingPlan:
        factor = train_factor if info.train else eval_factor
        if factor is None:
            return _renormalised(plan) if plan.renormalise else plan
        places = expert_places(
            info.group_tokens,
            share=exact(factor) * choices * per_pool / config.num_experts,
            rounding=config.capacity_rounding,
            at_least=config.min_capacity,
        )
        num_pools = config.num_experts // per_pool
        if plan.indivisible:
            tokens = _waiting_tokens(plan, config.token_drop_policy, per_pool)
            served = _served(tokens, info, places, num_pools, group_axis)[plan.token_ids]
        else:
            rows = num_choices if pools is not None else 1
            waiting = _Waiting(plan.token_ids, plan.expert_ids // per_pool, _urgency(plan, config.token_drop_policy))
            served = _served(waiting, info, places * rows, num_pools, group_axis)
        left = replace(plan, expert_ids=plan.expert_ids.masked_fill(~served, plan.num_experts))
        return _renormalised(left) if plan.renormalise else left

    return limit


def limit_is_causal(config: MoEConfig, num_choices: int) -> bool:
    """Whether what happens to a token is independent of later positions of its sequence.

    First choices that are served before every second one, or heavy before light, push earlier tokens out.
    """
    if _factors(config) == (None, None):
        return True
    return config.token_drop_policy == "position" and (config.slot_priority == "token_major" or num_choices == 1)


def _factors(config: MoEConfig) -> tuple[float | None, float | None]:
    """(training, evaluation): places per expert in shares of an even split; None = dropless."""
    train = config.expert_capacity_factor
    return train, config.eval_capacity_factor if config.eval_capacity_factor is not None else train


def exact(factor: float) -> Fraction:
    """The decimal that a person wrote (1.1, not 1.100000000000000088), to six places."""
    return Fraction(str(factor)).limit_denominator(10**6)


def expert_places(tokens: Tensor, *, share: Fraction, rounding: str, at_least: int) -> Tensor:
    """Places of each expert in groups of that many tokens: share · tokens made whole, at least and at most so many.

    tokens: int64, any shape.   rounding: "ceil" (Megatron), "floor" (Mesh-TensorFlow), "round" (flaxformer: to the
    nearest, halves to the even).  Integers throughout: no rounding error decides over a place, and no device waits.
    """
    shares, divisor = tokens * share.numerator, share.denominator
    whole = shares // divisor
    twice_rest = 2 * (shares - whole * divisor)
    if rounding == "ceil":
        whole = whole + (twice_rest > 0)
    elif rounding == "round":
        whole = whole + ((twice_rest > divisor) | ((twice_rest == divisor) & (whole % 2 == 1)))
    return torch.minimum(whole.clamp(min=at_least), tokens)


def sorted_order(*columns: Tensor) -> Tensor:
    """(N,) int64: the rows sorted by the first column, equal ones by the second, and so on."""
    order = columns[-1].argsort(stable=True)
    for column in reversed(columns[:-1]):
        order = order[column[order].argsort(stable=True)]
    return order


def _urgency(plan: RoutingPlan, policy: str) -> list[Tensor]:
    """What assignments are sorted by, lowest first, before their order in the sequence."""
    if policy == "probs":
        return [-plan.combine_weights.detach()]
    found = [] if plan.priority is None else [plan.priority]
    if policy == "bpr":
        # within each rank of choice, the surest tokens first
        assert plan.confidence is not None
        found.append(-plan.confidence[plan.token_ids])
    return found


def _waiting_tokens(plan: RoutingPlan, policy: str, per_pool: int) -> _Waiting:
    """The tokens of an indivisible plan, each with all of its assignments. Which choice is the first means nothing."""
    nobody = plan.num_experts // per_pool
    tokens = torch.arange(plan.num_tokens, device=plan.token_ids.device)
    pools = torch.full_like(tokens, nobody).scatter_reduce(0, plan.token_ids, plan.expert_ids // per_pool, "amin")
    if policy == "probs":
        heaviest = plan.combine_weights.new_zeros(plan.num_tokens)
        heaviest = heaviest.scatter_reduce(0, plan.token_ids, plan.combine_weights, "amax", include_self=False)
        return _Waiting(tokens, pools, [-heaviest.detach()])
    if policy == "bpr":
        assert plan.confidence is not None
        return _Waiting(tokens, pools, [-plan.confidence])
    return _Waiting(tokens, pools, [])


def _renormalised(plan: RoutingPlan) -> RoutingPlan:
    """The weights that are left of each token, divided by their sum; zeros stay zeros."""
    kept = plan.combine_weights.masked_fill(plan.expert_ids == plan.num_experts, 0.0)
    total = kept.new_zeros(plan.num_tokens).index_add(0, plan.token_ids, kept)[plan.token_ids]
    return replace(plan, combine_weights=kept / total.where(total != 0, 1.0))


def _served(waiting: _Waiting, info: TokenInfo, places: Tensor, num_pools: int, group_axis: Axis) -> Tensor:
    """(N,) bool: whether each is among the first of its group's pool; true or false for nobody's."""
    buckets = info.groups[waiting.token_ids] * (num_pools + 1) + waiting.pools
    columns = [buckets, *(_sortable(values) for values in waiting.urgency)]
    rows = torch.stack([*columns, info.keys[waiting.token_ids]], dim=1)
    counts = gather_counts(rows.shape[0], group_axis, rows.device)
    if sum(counts) > 0:
        rows = group_axis.comm.all_gather(rows, counts)
    order = sorted_order(*rows.unbind(dim=1))
    sorted_buckets = rows[order, 0]
    # the queue of a pool begins where its bucket begins
    first = torch.searchsorted(sorted_buckets, sorted_buckets)
    queued_before = torch.arange(order.numel(), device=order.device) - first
    served = torch.empty_like(order, dtype=torch.bool)
    served[order] = queued_before < places[sorted_buckets // (num_pools + 1)]
    start = sum(counts[: group_axis.rank])
    return served[start : start + buckets.numel()]


def _sortable(values: Tensor) -> Tensor:
    """int64 in the same order, so that floats and integers travel and sort alike."""
    if not values.is_floating_point():
        return values.to(torch.int64)
    # + 0.0 makes -0.0 equal to 0.0; the bits of negative numbers run backwards
    bits = (values.to(torch.float64) + 0.0).view(torch.int64)
    return bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)
