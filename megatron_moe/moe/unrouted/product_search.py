"""The best of n² cells whose scores are sums of two: found among the best of each half."""

import torch
from torch import Tensor

from megatron_moe.moe.unrouted.cell_choice import first_best, largest


def best_sums(halves: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` cells with the largest halves[..., 0, i] + halves[..., 1, j], in any order: cell i · n + j.

    halves: (T, heads, 2, n).   Returns cells (T, heads, count) int64, and their scores of that shape with gradient.
    Exactly what a search over all n² finds, of equal sums those with the better first half, then second half, then the
    lowest: an order that the rounding of sums cannot upset.  [arXiv:1907.05242, section 3.1.2]
    """
    n = halves.shape[3]
    best = largest(halves, min(count, n))
    scores = halves.detach().gather(3, best)
    first, second = _worth_trying(best.shape[3], count, halves.device)
    # pairs stand by their place in the first half, then in the second
    chosen = first_best(scores[:, :, 0, first] + scores[:, :, 1, second], count)
    left, right = best[:, :, 0].gather(2, first[chosen]), best[:, :, 1].gather(2, second[chosen])
    return left * n + right, halves[:, :, 0].gather(2, left) + halves[:, :, 1].gather(2, right)


def _worth_trying(width: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places (a, b) among the best of the two halves, counted from 0, that may be among the `count` best sums.

    (a + 1)(b + 1) - 1 others are no worse: for 32 cells 119 pairs are left of 1,024.
    """
    rank = torch.arange(1, width + 1)
    first, second = (rank[:, None] * rank <= count).nonzero(as_tuple=True)
    return first.to(device), second.to(device)
