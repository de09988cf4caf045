"""A copy of this rank's blocks in host memory, laid out as its files will be; training may go on at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.checkpoint.reshard import Rectangle
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


@dataclass(frozen=True)
class HostBlocks:
    """Blocks one after the other in one stretch of memory, the widest dtype first, so that all are aligned."""

    blocks: tuple[HostBlock, ...]
    data: Bytes


@dataclass(frozen=True)
class PartSnapshot:
    """What this rank writes of one part, and the replicas of which it only tells the hash."""

    written: HostBlocks
    compared: HostBlocks


Snapshot = dict[str, PartSnapshot]


def take_snapshot(parts: Mapping[str, Sequence[Block]]) -> Snapshot:
    """Copy all blocks to host memory; returns when they are copied.

    Raises CheckpointError for a block that cannot be stored, MemoryError or RuntimeError (torch's) without memory.
    """
    return {
        part: PartSnapshot(
            written=_copy([block for block in blocks if block.primary]),
            compared=_copy([block for block in blocks if not block.primary]),
        )
        for part, blocks in parts.items()
    }


def _copy(blocks: Sequence[Block]) -> HostBlocks:
    ordered = sorted(blocks, key=lambda block: -block.tensor.element_size())
    found = []
    position = 0
    for block in ordered:
        found.append(_describe(block, position))
        position += found[-1].length
    memory = torch.empty(position, dtype=torch.uint8)
    for host, block in zip(found, ordered, strict=True):
        _room(memory, host, block.tensor).copy_(block.tensor.detach())
    return HostBlocks(tuple(found), bytes_of(memory))


def _room(memory: Tensor, host: HostBlock, tensor: Tensor) -> Tensor:
    return memory[host.start : host.start + host.length].view(tensor.dtype).view(tensor.shape)


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
