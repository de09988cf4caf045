"""safetensors files: an 8-byte length, a JSON header, then the tensors' bytes without a gap.

Written here rather than by the library, so that every byte goes through Storage and its place is known; any
safetensors reader opens them.
"""

import json
import os
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_moe.checkpoint.reshard import Rectangle

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT_BYTES = 100_000_000

Bytes = NDArray[np.uint8]


def header_bytes(
    entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], multiple: int = 8
) -> bytes:
    """The head of a file that holds these (name, dtype, shape) one after the other; padded to a multiple of bytes."""
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape in entries:
        length = prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + length]}
        position += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> Bytes:
    """The bytes of a contiguous tensor on the CPU, shared with it, one dimension."""
    # a tensor of one element is contiguous whatever its strides, which view() would refuse
    found: Bytes = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return found


# gaps up to this many bytes are read and thrown away: cheaper than a call for each run
_GAP_BYTES = 16 << 10
_SCRATCH_BYTES = 8 << 20
# one read call takes at most 2 GiB
_CALL_BYTES = 1 << 30


def read_exactly(file: int, out: Bytes, start: int) -> None:
    """Fill `out` from byte `start` on. Raises OSError, EOFError when the file ends before."""
    position = 0
    while position < len(out):
        taken = os.preadv(file, [out.data[position : position + _CALL_BYTES]], start + position)
        if taken == 0:
            raise EOFError(f"the file ends at byte {start + position:,}, {len(out) - position:,} bytes too early")
        position += taken


def read_scattered(file: int, outs: Sequence[Bytes], start: int) -> None:
    """Fill several stretches of memory from bytes that follow each other, in one call unless the file system says less.

    Raises OSError, EOFError as `read_exactly`.
    """
    taken = os.preadv(file, [out.data for out in outs], start)
    for out in outs:
        if taken < len(out):
            read_exactly(file, out[taken:], start + taken)
        taken = max(0, taken - len(out))
        start += len(out)


def read_rectangle(file: int, start: int, stored: Rectangle, wanted: Rectangle, itemsize: int, out: Bytes) -> None:
    """Read `wanted`, part of the rectangle `stored` whose bytes begin at `start`; out: its bytes, row-major.

    Only the runs that are needed are read; where they lie close together, the gaps between them too.
    """
    run, period, rows = _runs(stored.shape, wanted.shape, itemsize)
    position = 0
    for first in _row_starts(stored, wanted, rows):
        part = out[position : position + run * rows].reshape(rows, run)
        _read_rows(file, start + first * itemsize, run, period, part)
        position += run * rows


def _runs(stored: tuple[int, ...], wanted: tuple[int, ...], itemsize: int) -> tuple[int, int, int]:
    """(bytes of an unbroken run, bytes from one run to the next, runs at that distance)."""
    partial = [dim for dim in range(len(stored)) if stored[dim] != wanted[dim]]
    if not partial or partial[-1] == 0:
        whole = prod(wanted) * itemsize
        return whole, whole, 1
    dim = partial[-1]
    return prod(wanted[dim:]) * itemsize, prod(stored[dim:]) * itemsize, wanted[dim - 1]


def _row_starts(stored: Rectangle, wanted: Rectangle, rows: int) -> Iterator[int]:
    """Element of `stored` at which each group of `rows` equally spaced runs begins."""
    inner = [begin - base for begin, base in zip(wanted.offset, stored.offset, strict=True)]
    partial = [dim for dim in range(len(inner)) if stored.shape[dim] != wanted.shape[dim]]
    outer = max(partial[-1] - 1, 0) if partial else 0
    strides = [prod(stored.shape[dim + 1 :]) for dim in range(len(inner))]
    base = sum(begin * stride for begin, stride in zip(inner, strides, strict=True))
    for index in np.ndindex(*wanted.shape[:outer]):
        yield base + sum(place * stride for place, stride in zip(index, strides, strict=False))


def _read_rows(file: int, start: int, run: int, period: int, out: Bytes) -> None:
    """out[i] = the `run` bytes at start + i·period."""
    rows = len(out)
    if run == period or rows == 1:
        read_exactly(file, out.reshape(-1), start)
        return
    if period - run > _GAP_BYTES:
        for row in range(rows):
            read_exactly(file, out[row], start + row * period)
        return
    batch = max(1, min(rows, _SCRATCH_BYTES // period))
    scratch = np.empty(batch * period, dtype=np.uint8)
    for first in range(0, rows, batch):
        count = min(batch, rows - first)
        # the gap after the last run may lie beyond the file's end
        read_exactly(file, scratch[: (count - 1) * period + run], start + first * period)
        out[first : first + count] = scratch[: count * period].reshape(count, period)[:, :run]
