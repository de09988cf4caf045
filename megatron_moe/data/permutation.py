"""A shuffled order that is computed, not stored: a keyed permutation of 0..size-1 in constant memory.

A mixed-radix Feistel network permutes a grid of rows x columns that is just large enough; what falls outside
0..size-1 is sent through again until it falls inside (cycle walking), which keeps the map one-to-one.
[Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002]
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)

UInt64 = np.ndarray[Any, np.dtype[np.uint64]]


def _mix(values: UInt64) -> UInt64:
    # splitmix64, in arithmetic modulo 2^64
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _MIX1
    values = (values ^ (values >> np.uint64(27))) * _MIX2
    return values ^ (values >> np.uint64(31))


class Permutation:
    """The order number `key` of 0..size-1; size up to 2^62, key any integer of 64 bits."""

    def __init__(self, size: int, *, key: int) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"a permutation needs 1 to 2^62 elements, not {size}")
        self.size = size
        rows = math.isqrt(size - 1) + 1
        self._rows, self._columns = np.uint64(rows), np.uint64(-(-size // rows))
        start = np.array([key & ((1 << 64) - 1)], np.uint64)
        self._round_keys = _mix(_mix(start) ^ np.arange(ROUNDS, dtype=np.uint64))

    def __call__(self, index: int) -> int:
        """Where `index` goes."""
        return int(self.apply(np.array([index]))[0])

    def apply(self, indices: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where each of `indices` (integers of 0..size-1, any shape) goes."""
        flat = np.asarray(indices).reshape(-1)
        if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < self.size:
            raise IndexError(f"an index is outside 0..{self.size - 1}")
        values = self._encrypt(flat.astype(np.uint64))
        while (outside := values >= np.uint64(self.size)).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64).reshape(np.shape(indices))

    def _encrypt(self, values: UInt64) -> UInt64:
        row, column = values // self._columns, values % self._columns
        for number, key in enumerate(self._round_keys):
            if number % 2:
                column = (column + _mix(row ^ key) % self._columns) % self._columns
            else:
                row = (row + _mix(column ^ key) % self._rows) % self._rows
        return row * self._columns + column
