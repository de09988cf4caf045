"""A copy of this rank's blocks in host memory, laid out as its files will be; training may go on at once."""

from collections.abc import Mapping, Sequence
from ctypes import memmove
from dataclasses import dataclass
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


class HostBlocks:
    """Blocks one after the other in one stretch of memory, the widest dtype first, so that all are aligned."""

    def __init__(self, blocks: Sequence[Block], data: Bytes) -> None:
        self.data = data
        self._blocks = blocks
        self._described: tuple[HostBlock, ...] | None = None

    def described(self) -> tuple[HostBlock, ...]:
        """Where each block lies in `data`, looked at when first asked: by then, training goes on.

        Raises CheckpointError for one that cannot be stored.
        """
        if self._described is None:
            found: list[HostBlock] = []
            position = 0
            for block in self._blocks:
                found.append(_describe(block, position))
                position += found[-1].length
            self._described = tuple(found)
            # their tensors may be copies that nobody else needs
            self._blocks = ()
        return self._described


@dataclass(frozen=True)
class PartSnapshot:
    """What this rank writes of one part, and the replicas of which it only tells the hash."""

    written: HostBlocks
    compared: HostBlocks


Snapshot = dict[str, PartSnapshot]


@dataclass(frozen=True)
class _Group:
    """Blocks in the order in which they are stored, and the bytes of each."""

    blocks: list[Block]
    sizes: list[int]
    num_bytes: int

    @classmethod
    def of(cls, blocks: list[Block]) -> "_Group":
        if len({block.tensor.dtype for block in blocks}) > 1:
            blocks = sorted(blocks, key=lambda block: -block.tensor.element_size())
        sizes = [block.tensor.nbytes for block in blocks]
        return cls(blocks, sizes, sum(sizes))


def _groups(parts: Mapping[str, Sequence[Block]]) -> list[_Group]:
    """Of each part what is written, then what is compared."""
    groups = []
    for blocks in parts.values():
        groups.append(_Group.of([block for block in blocks if block.primary]))
        groups.append(_Group.of([block for block in blocks if not block.primary]))
    return groups


def _room(groups: Sequence[_Group], memory: HostMemory) -> tuple[Tensor, list[int], set[torch.device]]:
    """Memory for them, the byte at which each begins, and the devices that they come from besides the CPU."""
    starts = list(accumulate((-(-group.num_bytes // PAGE_BYTES) * PAGE_BYTES for group in groups), initial=0))
    devices = {block.tensor.device for group in groups for block in group.blocks if block.tensor.is_cuda}
    return memory.room(starts[-1], pinned=bool(devices)), starts, devices


def prepare_memory(parts: Mapping[str, Sequence[Block]], memory: HostMemory) -> None:
    """Get the memory of a snapshot from the system beforehand. Raises MemoryError or RuntimeError without memory."""
    # the system gives a page when it is first touched
    bytes_of(_room(_groups(parts), memory)[0])[::PAGE_BYTES] = 0


def take_snapshot(parts: Mapping[str, Sequence[Block]], memory: HostMemory) -> Snapshot:
    """Copy all blocks to host memory; returns when they are copied, and looks at them no further: training waits.

    The snapshot lies in `memory` and lasts until that is used again.
    Raises MemoryError or RuntimeError (torch's) without memory.
    """
    groups = _groups(parts)
    whole, starts, devices = _room(groups, memory)
    copied = [
        _copy(group, whole[start : start + group.num_bytes]) for group, start in zip(groups, starts[:-1], strict=True)
    ]
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    pairs = zip(copied[::2], copied[1::2], strict=True)
    return {part: PartSnapshot(*pair) for part, pair in zip(parts, pairs, strict=True)}


def _copy(group: _Group, room: Tensor) -> HostBlocks:
    position, begin = 0, room.data_ptr()
    for block, size in zip(group.blocks, group.sizes, strict=True):
        tensor = block.tensor
        if tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg():
            # torch's own copy takes longer than the bytes of a small expert
            memmove(begin + position, tensor.data_ptr(), size)
        else:
            target = room[position : position + size].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor.detach(), non_blocking=True)
        position += size
    return HostBlocks(group.blocks, bytes_of(room))


def _describe(block: Block, start: int) -> HostBlock:
    rectangle = Rectangle(block.offset, block.shape)
    if not rectangle.fits(block.global_shape):
        raise CheckpointError(
            f"block {rectangle} lies outside tensor '{block.name}' of shape {list(block.global_shape)}"
        )
    dtype = DTYPE_NAMES.get(block.tensor.dtype)
    if dtype is None:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"tensor '{block.name}': {block.tensor.dtype} cannot be stored; known are {known}")
    if block.name.startswith("__") or not 0 < len(block.name) <= 4096:
        raise CheckpointError(f"{block.name[:80]!r} cannot be the name of a stored tensor")
    return HostBlock(block.name, dtype, block.global_shape, rectangle, start)
