"""Filling blocks from files: which stored slices meet which blocks, and reading just that, file after file."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_moe.checkpoint.manifest import Manifest, StoredSlice, StoredTensor
from megatron_moe.checkpoint.reshard import Rectangle, RectangleIndex, split_rectangle
from megatron_moe.checkpoint.tensor_file import DTYPES, Bytes, bytes_of, read_rectangle
from megatron_moe.checkpoint.verify import opened
from megatron_moe.config.errors import CheckpointError
from megatron_moe.parallel.blocks import Block

# what passes through host memory at a time on its way to a GPU, to another type or to a strided view
_SCRATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class _Read:
    """A rectangle to be read from a slice into `region`, the part of a block that has its shape."""

    source: StoredSlice
    wanted: Rectangle
    dtype: torch.dtype
    region: Tensor


def fill_blocks(folder: Path, manifest: Manifest, stored: Mapping[str, StoredTensor], blocks: Sequence[Block]) -> None:
    """Fill every element of every block once. The blocks' names are stored, their shapes agree.

    Raises CheckpointError if a block is not covered or a file cannot be read.
    """
    by_file: dict[str, list[_Read]] = defaultdict(list)
    for read in _plan(stored, blocks):
        by_file[read.source.file].append(read)
    scratch = np.empty(0, dtype=np.uint8)
    for name, reads in sorted(by_file.items()):
        with opened(folder / name, manifest.files[name].size) as file:
            for read in sorted(reads, key=lambda read: read.source.start):
                if _is_direct(read):
                    source, out = read.source, bytes_of(read.region)
                    read_rectangle(file, source.start, source.rectangle, read.wanted, read.dtype.itemsize, out)
                else:
                    scratch = scratch if len(scratch) else np.empty(_SCRATCH_BYTES, dtype=np.uint8)
                    _read_through(file, read, scratch)


def _plan(stored: Mapping[str, StoredTensor], blocks: Sequence[Block]) -> list[_Read]:
    indices: dict[str, RectangleIndex] = {}
    reads = []
    for block in blocks:
        tensor = stored[block.name]
        target = Rectangle(tuple(block.offset), block.shape)
        if target.volume == 0:
            continue
        if block.name not in indices:
            indices[block.name] = RectangleIndex([part.rectangle for part in tensor.slices])
        filled = 0
        for number in indices[block.name].meeting(target):
            part = tensor.slices[number]
            wanted = part.rectangle.intersect(target)
            if wanted is not None:
                region = block.tensor.detach()[wanted.slices_in(target)]
                reads.append(_Read(part, wanted, DTYPES[tensor.dtype], region))
                filled += wanted.volume
        # stored slices do not overlap, so the right count means that each element is filled once
        if filled != target.volume:
            raise CheckpointError(
                f"tensor '{block.name}': only {filled:,} of the {target.volume:,} elements of {target} are stored"
            )
    return reads


def _is_direct(read: _Read) -> bool:
    return read.region.device.type == "cpu" and read.region.is_contiguous() and read.region.dtype == read.dtype


def _read_through(file: int, read: _Read, scratch: Bytes) -> None:
    size = read.dtype.itemsize
    for part in split_rectangle(read.wanted, _SCRATCH_BYTES // size):
        out = scratch[: part.volume * size]
        read_rectangle(file, read.source.start, read.source.rectangle, part, size, out)
        read.region[part.slices_in(read.wanted)].copy_(torch.from_numpy(out).view(read.dtype).view(part.shape))
