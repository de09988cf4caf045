"""Filling blocks from files: which stored slices meet which blocks, and reading just that, file after file.

A slice of which a block wants all is hashed as it is read, if asked for; its bytes are then read once.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_moe.checkpoint.beside import HashesBeside, Stream
from megatron_moe.checkpoint.manifest import Manifest, StoredSlice, StoredTensor
from megatron_moe.checkpoint.reshard import Rectangle, RectangleIndex, split_rectangle
from megatron_moe.checkpoint.tensor_file import DTYPES, Bytes, bytes_of, read_exactly, read_rectangle, read_scattered
from megatron_moe.checkpoint.verify import opened
from megatron_moe.config.errors import CheckpointError
from megatron_moe.parallel.blocks import Block

# what passes through host memory at a time on its way to a GPU, to another type or to a strided view
_SCRATCH_BYTES = 32 << 20
# read by one call, whether it is part of a slice or many slices; hashed while the next are read
_CALL_BYTES = 8 << 20
# the system takes 1024 stretches of memory in one call
_CALL_SLICES = 512


class _Read(NamedTuple):
    """A rectangle to be read from a slice into `region`, the part of a block that has its shape."""

    name: str
    source: StoredSlice
    wanted: Rectangle
    dtype: torch.dtype
    region: Tensor

    @property
    def is_whole(self) -> bool:
        return self.wanted == self.source.rectangle

    @property
    def is_direct(self) -> bool:
        region = self.region
        return region.is_cpu and region.dtype == self.dtype and region.is_contiguous()


def fill_blocks(
    folder: Path,
    manifest: Manifest,
    stored: Mapping[str, StoredTensor],
    blocks: Sequence[Block],
    hashes: HashesBeside | None = None,
) -> None:
    """Fill every element of every block once. The blocks' names are stored, their shapes agree.

    hashes: is given each slice that is read whole, and tells its problems.
    Raises CheckpointError if a block is not covered or a file cannot be read.
    """
    by_file: dict[str, list[_Read]] = defaultdict(list)
    for read in _plan(stored, blocks):
        by_file[read.source.file].append(read)
    scratch = _Scratch()
    for name, reads in sorted(by_file.items()):
        with opened(folder / name, manifest.files[name].size) as file:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for batch in _batches(sorted(reads, key=lambda read: read.source.start)):
                _read_batch(file, batch, scratch, hashes)


def _plan(stored: Mapping[str, StoredTensor], blocks: Sequence[Block]) -> Iterator[_Read]:
    indices: dict[str, RectangleIndex] = {}
    for block in blocks:
        tensor = stored[block.name]
        target = Rectangle(tuple(block.offset), block.shape)
        if target.volume == 0:
            continue
        dtype = DTYPES[tensor.dtype]
        region = block.tensor.detach()
        if len(tensor.slices) == 1 and tensor.slices[0].rectangle == target:
            yield _Read(block.name, tensor.slices[0], target, dtype, region)
            continue
        if block.name not in indices:
            indices[block.name] = RectangleIndex([part.rectangle for part in tensor.slices])
        filled = 0
        for number in indices[block.name].meeting(target):
            part = tensor.slices[number]
            wanted = part.rectangle.intersect(target)
            if wanted is not None:
                yield _Read(block.name, part, wanted, dtype, region[wanted.slices_in(target)])
                filled += wanted.volume
        # stored slices do not overlap, so the right count means that each element is filled once
        if filled != target.volume:
            raise CheckpointError(
                f"tensor '{block.name}': only {filled:,} of the {target.volume:,} elements of {target} are stored"
            )


def _batches(reads: Sequence[_Read]) -> Iterator[list[_Read]]:
    """Small slices that follow each other in the file and are read as they are, together; all others alone."""
    batch: list[_Read] = []
    size = stop = 0
    for read in reads:
        source = read.source
        joins = source.length <= _CALL_BYTES and read.is_whole and read.is_direct
        fits = joins and source.start == stop and size + source.length <= _CALL_BYTES and len(batch) < _CALL_SLICES
        if batch and not fits:
            yield batch
            batch, size = [], 0
        batch.append(read)
        size += source.length
        stop = source.start + source.length if joins else -1
    if batch:
        yield batch


def _read_batch(file: int, batch: Sequence[_Read], scratch: "_Scratch", hashes: HashesBeside | None) -> None:
    read = batch[0]
    source = read.source
    if not read.is_direct:
        stream = hashes.stream(source, read.name) if hashes and read.is_whole else None
        _read_through(file, read, scratch, stream)
    elif not read.is_whole:
        out = bytes_of(read.region)
        read_rectangle(file, source.start, source.rectangle, read.wanted, read.dtype.itemsize, out)
    elif source.length > _CALL_BYTES:
        _read_long(file, source, bytes_of(read.region), hashes.stream(source, read.name) if hashes else None)
    else:
        regions = [bytes_of(read.region) for read in batch]
        read_scattered(file, regions, source.start)
        if hashes:
            hashes.compare([(region, read.source, read.name) for region, read in zip(regions, batch, strict=True)])


def _read_long(file: int, source: StoredSlice, out: Bytes, stream: Stream | None) -> None:
    for start in range(0, len(out), _CALL_BYTES):
        part = out[start : start + _CALL_BYTES]
        read_exactly(file, part, source.start + start)
        if stream:
            stream.update(part)
    if stream:
        stream.end()


class _Scratch:
    """Memory that is there from the first use on."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, dtype=np.uint8)

    def first(self, num_bytes: int) -> Bytes:
        if not len(self._memory):
            self._memory = np.empty(_SCRATCH_BYTES, dtype=np.uint8)
        return self._memory[:num_bytes]


def _read_through(file: int, read: _Read, scratch: _Scratch, stream: Stream | None) -> None:
    size = read.dtype.itemsize
    for part in split_rectangle(read.wanted, _SCRATCH_BYTES // size):
        out = scratch.first(part.volume * size)
        read_rectangle(file, read.source.start, read.source.rectangle, part, size, out)
        hashed = stream.update(out) if stream else None
        read.region[part.slices_in(read.wanted)].copy_(torch.from_numpy(out).view(read.dtype).view(part.shape))
        if hashed:
            hashed.result()
    if stream:
        stream.end()
