"""One number for the bits of a tensor, computed where the tensor is, in which any flipped bit shows.

h = Σ_i mix(w_i + i · c)  (mod 2^64)        w_i: the i-th 8 bytes;   c odd;   mix: splitmix64, one to one

A change within one word changes exactly one term of the sum, and to another value, because mix is one to one: so any
flipped bit, and any damage within 8 bytes, always changes h. Other damage leaves h as it was in one of 2^64 cases.
Integers are summed, so that the order does not matter: all devices find the same number.
"""

import torch
from torch import Tensor

from megatron_moe.parallel.random import GOLDEN, mix_, signed

WORD = 8  # bytes
# words at a time: they fit in a core's cache; a GPU wants many
CHUNK = {"cpu": 1 << 15}
GPU_CHUNK = 1 << 23


@torch.no_grad()
def bit_hash(tensor: Tensor) -> Tensor:
    """() int64, of any dtype and shape; not of the shape. Nothing waits for the device."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    rest = data.numel() % WORD
    words = _words(data[: data.numel() - rest])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    size = CHUNK.get(tensor.device.type, GPU_CHUNK)
    places = torch.arange(min(size, words.numel() + 1), device=tensor.device) * GOLDEN
    for start in range(0, words.numel(), size):
        part = words[start : start + size]
        total += mix_(part + places[: part.numel()] + signed(start * GOLDEN)).sum()
    if rest:
        last = torch.zeros(WORD, dtype=torch.uint8, device=tensor.device)
        last[:rest] = data[-rest:]
        total += mix_(last.view(torch.int64) + signed(words.numel() * GOLDEN)).sum()
    return total


def _words(data: Tensor) -> Tensor:
    # what begins between two words cannot be looked at as such
    return (data if data.storage_offset() % WORD == 0 else data.clone()).view(torch.int64)
