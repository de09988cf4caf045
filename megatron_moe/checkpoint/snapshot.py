"""A copy of this rank's blocks in host memory, laid out as its files will be; training may go on at once."""

from collections.abc import Iterable, Mapping, Sequence
from ctypes import memmove
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from megatron_moe.checkpoint.host_memory import HostMemory
from megatron_moe.checkpoint.reshard import Rectangle
from megatron_moe.checkpoint.storage import PAGE_BYTES
from megatron_moe.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, Bytes, bytes_of
from megatron_moe.config.errors import CheckpointError
from megatron_moe.parallel.blocks import Block


@dataclass(frozen=True)
class HostBlock:
    """A block without its numbers: these are the bytes start..start+length of the snapshot that holds it."""

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    rectangle: Rectangle
    start: int

    @property
    def length(self) -> int:
        return self.rectangle.volume * DTYPES[self.dtype].itemsize

    @property
    def key(self) -> str:
        """Its name in a safetensors file: that of the logical tensor, and which part unless all of it."""
        return self.name if self.rectangle.shape == self.global_shape else f"{self.name}{self.rectangle}"


# name, type, global shape, offset and shape of a block: all but its numbers
_Facts = tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class HostBlocks:
    """Blocks one after the other in one stretch of memory, the widest dtype first, so that all are aligned."""

    facts: tuple[_Facts, ...] = field(repr=False)
    data: Bytes

    def described(self) -> tuple[HostBlock, ...]:
        """Where each block lies in `data`. Raises CheckpointError for one that cannot be stored."""
        found: list[HostBlock] = []
        position = 0
        for facts in self.facts:
            found.append(_describe(facts, position))
            position += found[-1].length
        return tuple(found)


@dataclass(frozen=True)
class PartSnapshot:
    """What this rank writes of one part, and the replicas of which it only tells the hash."""

    written: HostBlocks
    compared: HostBlocks


Snapshot = dict[str, PartSnapshot]


def take_snapshot(parts: Mapping[str, Sequence[Block]], memory: HostMemory) -> Snapshot:
    """Copy all blocks to host memory; returns when they are copied, and looks at them no further: training waits.

    The snapshot lies in `memory` and lasts until that is used again.
    Raises MemoryError or RuntimeError (torch's) without memory.
    """
    groups: list[list[Block]] = []
    for blocks in parts.values():
        groups.append(_widest_first(block for block in blocks if block.primary))
        groups.append(_widest_first(block for block in blocks if not block.primary))
    sizes = [sum(block.tensor.nbytes for block in group) for group in groups]
    starts = list(accumulate((-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes), initial=0))
    devices = {block.tensor.device for group in groups for block in group if block.tensor.is_cuda}
    whole = memory.room(starts[-1], pinned=bool(devices))
    copied = [
        _copy(group, whole[start : start + size])
        for group, start, size in zip(groups, starts[:-1], sizes, strict=True)
    ]
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    pairs = zip(copied[::2], copied[1::2], strict=True)
    return {part: PartSnapshot(*pair) for part, pair in zip(parts, pairs, strict=True)}


def _widest_first(blocks: Iterable[Block]) -> list[Block]:
    return sorted(blocks, key=lambda block: -block.tensor.element_size())


def _copy(blocks: Sequence[Block], room: Tensor) -> HostBlocks:
    facts: list[_Facts] = []
    position, begin = 0, room.data_ptr()
    for block in blocks:
        tensor = block.tensor
        size = tensor.nbytes
        if tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg():
            # torch's own copy takes longer than the bytes of a small expert
            memmove(begin + position, tensor.data_ptr(), size)
        else:
            target = room[position : position + size].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor.detach(), non_blocking=True)
        facts.append((block.name, tensor.dtype, block.global_shape, block.offset, tuple(tensor.shape)))
        position += size
    return HostBlocks(tuple(facts), bytes_of(room))


def _describe(facts: _Facts, start: int) -> HostBlock:
    name, torch_dtype, global_shape, offset, shape = facts
    rectangle = Rectangle(offset, shape)
    if not rectangle.fits(global_shape):
        raise CheckpointError(f"block {rectangle} lies outside tensor '{name}' of shape {list(global_shape)}")
    dtype = DTYPE_NAMES.get(torch_dtype)
    if dtype is None:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"tensor '{name}': {torch_dtype} cannot be stored; known are {known}")
    if name.startswith("__") or not 0 < len(name) <= 4096:
        raise CheckpointError(f"{name[:80]!r} cannot be the name of a stored tensor")
    return HostBlock(name, dtype, global_shape, rectangle, start)
