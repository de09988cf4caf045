"""A choice of the best among cells that are split over ep: the same as if one rank had scored them all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.parallel.collectives import gather_counts, gather_for_partial
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class Gathered:
    """The tokens of all ranks of ep, in rank order, on each of them."""

    rows: Tensor  # (T', width), with gradient
    counts: list[int]  # rows of each rank
    is_padding: Tensor  # (T',)


def gather_tokens(rows: Tensor, is_padding: Tensor, ep: Axis) -> Gathered:
    """rows: (T, width) of this rank.   is_padding: (T,)."""
    counts = gather_counts(rows.shape[0], ep, rows.device)
    padding = ep.comm.all_gather(is_padding.to(torch.int64), counts) > 0
    return Gathered(gather_for_partial(rows, ep, counts), counts, padding)


def best_cells(scores: Tensor, count: int, ep: Axis) -> Tensor:
    """(T', cells of this rank) bool: who is among the `count` best of all ranks' cells; exactly `count` in each row.

    scores: (T', cells of this rank).   Of equal scores the lowest cells; a score that is no number comes last.
    Each rank shows its own best, and all find the same threshold.  Sorting with ties in order costs far more.
    """
    values = scores.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    width = min(count, values.shape[-1])
    mine = values.topk(width, dim=1, sorted=False).values
    # candidates of the ranks side by side: (T', ep · width)
    everyone = ep.comm.all_gather(mine.t().contiguous(), [width] * ep.size).t()
    last = _last_of_best(everyone, count)
    left = count - (everyone > last).sum(dim=1, keepdim=True)
    # lower cells are on earlier ranks; one that shows fewer of its equals than it has shows at least `left`
    taken = (everyone[:, : ep.rank * width] == last).sum(dim=1, keepdim=True)
    return _down_to(values, last, left - taken)


def first_best(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` largest along the last dimension, in rising order; the same rule on one rank."""
    values = scores.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).flatten(0, -2)
    last = _last_of_best(values, count)
    chosen = _down_to(values, last, count - (values > last).sum(dim=1, keepdim=True))
    return chosen.nonzero()[:, 1].view(*scores.shape[:-1], count)


def _last_of_best(values: Tensor, count: int) -> Tensor:
    """(rows, 1): the smallest of each row's `count` largest."""
    best = values if count == values.shape[1] else values.topk(count, dim=1, sorted=False).values
    return best.amin(dim=1, keepdim=True)


def _down_to(values: Tensor, last: Tensor, left: Tensor) -> Tensor:
    """bool: what is above `last`, and the first `left` that equal it.   last, left: (rows, 1)."""
    level = values == last
    return (values > last) | (level & (level.cumsum(dim=1, dtype=torch.int32) <= left))


def largest(values: Tensor, count: int) -> Tensor:
    """Places of the largest along the last dimension, best first, of equals the first. No gradient."""
    places = first_best(values, count)
    order = values.detach().gather(-1, places).sort(dim=-1, descending=True, stable=True).indices
    return places.gather(-1, order)
