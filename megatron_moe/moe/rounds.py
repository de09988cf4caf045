"""Dropless with a bound: when one rank would receive more rows than its part, they come in several rounds."""

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from megatron_moe.moe.capacity import exact
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.parallel.state import Axis


def in_rounds(plan: RoutingPlan, factor: float, ep: Axis, etp: Axis) -> list[RoutingPlan]:
    """The plan cut so that no rank of ep receives more than `factor` even parts of all rows at a time.

    Together the rounds hold each assignment once; every rank has the same number of them, one where all parts are
    small enough.  Collective over ep and etp; waits for the device.
    """
    rank_of = plan.expert_ids // (plan.num_experts // ep.size)  # ep.size for nobody
    counts = rank_of.bincount(minlength=ep.size + 1)[: ep.size]
    everyone = _all_counts(counts, ep, etp)
    totals = everyone.sum(dim=0)
    rows = int(totals.sum())
    bound = max(1, -int(-exact(factor) * Fraction(rows, ep.size) // 1))
    number = -(-int(totals.max()) // bound)
    if number <= 1:
        return [plan]
    before = everyone[: etp.rank * ep.size + ep.rank].sum(dim=0).to(rank_of.device)
    place = _place_among(rank_of, ep.size)
    turn = (place + torch.cat([before, before.new_zeros(1)])[rank_of]) // bound
    return [
        replace(plan, expert_ids=plan.expert_ids.where(turn == number_, plan.num_experts)) for number_ in range(number)
    ]


def _all_counts(counts: Tensor, ep: Axis, etp: Axis) -> Tensor:
    """(etp · ep, ep) on the host: rows from each rank that shares these experts, etp first, to each rank of ep."""
    of_ep = ep.comm.all_gather(counts[None], [1] * ep.size)
    return etp.comm.all_gather(of_ep, [ep.size] * etp.size).cpu()


def _place_among(rank_of: Tensor, size: int) -> Tensor:
    """(N,) how many earlier assignments go to the same rank."""
    order = rank_of.argsort(stable=True)
    counts = rank_of.bincount(minlength=size + 1)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(rank_of)
    place[order] = torch.arange(len(rank_of), device=rank_of.device) - starts[rank_of[order]]
    return place
