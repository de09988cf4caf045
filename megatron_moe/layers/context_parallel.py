"""How a sequence is cut over context-parallel ranks: the one function that positions, attention and loss share."""

import torch
from torch import Tensor

from megatron_moe.parallel.collectives import gather_for_partial
from megatron_moe.parallel.state import Axis


def own_chunks(size: int, rank: int) -> tuple[int, int]:
    """Which two of the sequence's 2·size chunks a rank holds, in its order: one from the front, one from the back."""
    return rank, 2 * size - 1 - rank


def context_rows(length: int, size: int, rank: int, device: torch.device) -> Tensor:
    """Sequence indices of a rank, in the order in which it holds them.

    The sequence is cut into 2·size chunks, of which each rank takes two, so that causal work is balanced.
    Returns (length/size,) int64.  Raises ValueError if 2·size does not divide the length.
    """
    if size == 1:
        return torch.arange(length, device=device)
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} is not cut evenly over {size} context-parallel ranks (2 chunks each)")
    chunks = torch.arange(length, device=device).view(2 * size, -1)
    return torch.cat([chunks[chunk] for chunk in own_chunks(size, rank)])


def sequence_order(length: int, size: int, device: torch.device) -> Tensor:
    """(length,) int64: the sequence index of each row, when the rows of all ranks stand one rank behind another."""
    return torch.cat([context_rows(length, size, rank, device) for rank in range(size)])


def gather_sequence(local: Tensor, cp: Axis, length: int) -> Tensor:
    """(S/cp, ...) of each rank -> (S, ...) in sequence order; gradients come back summed over the ranks."""
    if cp.size == 1:
        return local
    gathered = gather_for_partial(local, cp, [length // cp.size] * cp.size)
    return gathered[sequence_order(length, cp.size, local.device).argsort()]
