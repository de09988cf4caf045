"""A choice of the best among cells that are split over ep: the same as if one rank had scored them all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.moe.unrouted.memory import largest
from megatron_moe.parallel.collectives import gather_counts, gather_for_partial
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class Gathered:
    """The tokens of all ranks of ep, in rank order, on each of them."""

    rows: Tensor  # (T', width), with gradient
    counts: list[int]
    is_padding: Tensor  # (T',)


def gather_tokens(rows: Tensor, is_padding: Tensor, ep: Axis) -> Gathered:
    """rows: (T, width) of this rank."""
    counts = gather_counts(rows.shape[0], ep, rows.device)
    padding = ep.comm.all_gather(is_padding.to(torch.int64), counts) > 0
    return Gathered(gather_for_partial(rows, ep, counts), counts, padding)


def best_cells(scores: Tensor, count: int, ep: Axis) -> tuple[Tensor, Tensor]:
    """(T', c) this rank's candidates as local cells, and whether each is among the `count` best of all ranks' cells.

    scores: (T', cells of this rank).   Equal scores: the lowest cell. Each rank brings its own best, and all agree.
    """
    mine = largest(scores, min(count, scores.shape[1]))
    width = mine.shape[1]
    # candidates of the ranks side by side: (ep · c, T')
    everyone = ep.comm.all_gather(scores.detach().gather(1, mine).t().contiguous(), [width] * ep.size).t()
    order = largest(everyone, count)
    chosen = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, order, True)
    return mine, chosen[:, ep.rank * width : (ep.rank + 1) * width]
