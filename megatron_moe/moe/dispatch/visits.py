"""A token travels once to each rank of an axis that holds any of its experts, and one row comes home from there."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.ops.permute import Copies, combine, copies_of, permute
from megatron_moe.parallel.collectives import exchange
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class Visits:
    """Which token goes to which rank of the axis, once each, and who comes here."""

    axis: Axis
    copies: Copies  # the visits (V,) by rank, then token
    send: list[int]  # visits to each rank
    receive: list[int]  # visits from each rank


@dataclass(frozen=True)
class Arrived:
    """What has come to this rank."""

    rows: Tensor  # (V', H) by sender, then token
    plan: RoutingPlan  # its tokens are the rows, its experts those of this rank of the axis
    keys: Tensor | None  # (V',) int64, where they were given
    visits: Visits


@dataclass(frozen=True)
class _Assignments:
    """The plan's assignments by rank of the axis; nobody's are left out."""

    chosen: Tensor  # (A,) places in the plan
    visit_of: Tensor  # (A,) each one's visit, counted within its rank
    send: list[int]  # to each rank


def send_visits(
    tokens: Tensor, plan: RoutingPlan, axis: Axis, keys: Tensor | None, beside: Callable[[], None]
) -> Arrived:
    """tokens: (T, H).   plan: theirs; its experts stand in order over the axis, as many on each rank.

    keys: (T,) int64 that travel along.   beside: called once, while the rows travel.   One row for each (token, rank)
    pair, the (expert, weight) pairs beside it.
    """
    visits, assignments, arriving = _who_goes_where(plan, axis)
    rows = exchange(permute(tokens, visits.copies), axis, visits.send, visits.receive, beside)
    if keys is not None:
        keys = axis.comm.all_to_all(keys[visits.copies.token_ids], visits.send, visits.receive)
    return Arrived(rows, _send_assignments(plan, visits, assignments, arriving), keys, visits)


def bring_home(rows: Tensor, visits: Visits, wide: torch.dtype) -> Tensor:
    """(V', H) answers to the rows that arrived -> (T, H): the sum over each token's visits, added in `wide`."""
    home = exchange(rows, visits.axis, visits.receive, visits.send)
    return combine(home, home.new_ones(home.shape[0], dtype=wide), visits.copies)


def _who_goes_where(plan: RoutingPlan, axis: Axis) -> tuple[Visits, _Assignments, list[int]]:
    """Also how many assignments come from each rank. Waits for the device."""
    chosen = (plan.expert_ids < plan.num_experts).nonzero().squeeze(1)
    ranks = plan.expert_ids[chosen] // (plan.num_experts // axis.size)
    order = ranks.argsort(stable=True)
    chosen, ranks = chosen[order], ranks[order]
    pairs = ranks * plan.num_tokens + plan.token_ids[chosen]
    unique, visit = pairs.unique(return_inverse=True)  # sorted: by rank, then token
    to_each = (unique // max(1, plan.num_tokens)).bincount(minlength=axis.size)
    first = to_each.cumsum(0) - to_each
    leaving = torch.stack([to_each, ranks.bincount(minlength=axis.size)], dim=1)
    ones = [1] * axis.size
    coming = axis.comm.all_to_all(leaving, ones, ones)
    send, send_assignments = leaving.t().tolist()
    receive, arriving = coming.t().tolist()
    copies = copies_of(unique % max(1, plan.num_tokens), plan.num_tokens)
    visits = Visits(axis, copies, send, receive)
    return visits, _Assignments(chosen, visit - first[ranks], send_assignments), arriving


def _send_assignments(
    plan: RoutingPlan, visits: Visits, assignments: _Assignments, arriving: list[int]
) -> RoutingPlan:
    """The plan of the rows received; experts counted from the first of this rank."""
    axis, device = visits.axis, plan.expert_ids.device
    experts = plan.num_experts // axis.size
    # visit and expert in one number: with many small experts these pairs weigh as much as the rows
    pairs = assignments.visit_of * experts + plan.expert_ids[assignments.chosen] % experts
    pairs = axis.comm.all_to_all(pairs, assignments.send, arriving)
    weights = exchange(plan.combine_weights[assignments.chosen], axis, assignments.send, arriving)
    # visits were counted within one sender: move them behind the rows of the senders before
    starts = torch.tensor([sum(visits.receive[:r]) for r in range(axis.size)], device=device)
    offset = starts.repeat_interleave(torch.tensor(arriving, device=device))
    return RoutingPlan(sum(visits.receive), experts, pairs // experts + offset, pairs % experts, weights)
