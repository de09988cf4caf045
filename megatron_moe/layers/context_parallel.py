"""How a sequence is cut over context-parallel ranks: the one function that positions, attention and loss share."""

import torch
from torch import Tensor

from megatron_moe.parallel.collectives import gather_for_partial
from megatron_moe.parallel.state import Axis


def context_rows(length: int, size: int, rank: int, device: torch.device) -> Tensor:
    """Sequence indices of a rank, in the order in which it holds them.

    The sequence is cut into 2·size chunks; rank r takes the r-th from the front and the r-th from the back, so that
    causal work is balanced.  Returns (length/size,) int64.  Raises ValueError if 2·size does not divide the length.
    """
    if size == 1:
        return torch.arange(length, device=device)
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} is not cut evenly over {size} context-parallel ranks (2 chunks each)")
    chunks = torch.arange(length, device=device).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def gather_sequence(local: Tensor, cp: Axis, length: int) -> Tensor:
    """(S/cp, ...) of each rank -> (S, ...) in sequence order; gradients come back summed over the ranks."""
    if cp.size == 1:
        return local
    gathered = gather_for_partial(local, cp, [length // cp.size] * cp.size)
    order = torch.cat([context_rows(length, cp.size, rank, local.device) for rank in range(cp.size)])
    return gathered[order.argsort()]
