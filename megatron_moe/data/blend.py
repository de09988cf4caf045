"""Several corpora in given proportions: which corpus, and which of its samples, is number n of the run.

The corpus is picked by a van der Corput sequence: the bits of n, reversed, are a point of [0, 1), and the corpora own
intervals as long as their weights. The points fill [0, 1) evenly at every moment, and how many of the first n fell into
an interval can be counted in O(log n), so nothing is stored and any n is reached at once. After n samples each corpus
has given weight x n of them, within log2(n) + 2.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from megatron_moe.config.errors import ConfigError

BITS = 62


@dataclass(frozen=True)
class Place:
    """A sample of the blend: number `index` of corpus number `dataset`."""

    dataset: int
    index: int


class Blend:
    """The order of a blend; weights are any positive numbers, one for each corpus."""

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or any(not 0 < weight < float("inf") for weight in weights):
            raise ConfigError(
                f"the weights of a blend must be positive numbers, not {list(weights)}; leave out a corpus of 0."
            )
        exact = [Fraction(weight) for weight in weights]
        sums = list(accumulate(exact))
        self._bounds = [0, *(round(total / sums[-1] * (1 << BITS)) for total in sums)]
        if any(low == high for low, high in zip(self._bounds, self._bounds[1:], strict=False)):
            raise ConfigError(
                f"a weight of the blend {list(weights)} is below 2^-{BITS} of the sum; leave that corpus out."
            )

    def locate(self, number: int) -> Place:
        """Which corpus gives sample `number` (0 to 2^62 - 1), and how many samples it gave before."""
        if not 0 <= number < 1 << BITS:
            raise IndexError(f"sample {number} is outside 0..2^{BITS}-1")
        dataset = bisect_right(self._bounds, _reverse(number)) - 1
        before = _points_below(self._bounds[dataset], number)
        return Place(dataset, _points_below(self._bounds[dataset + 1], number) - before)


def _reverse(number: int) -> int:
    return int(format(number, f"0{BITS}b")[::-1], 2)


def _points_below(bound: int, count: int) -> int:
    """How many of the first `count` points lie below `bound`, in units of 2^-62.

    The numbers 0..count-1 are a block of 2^b numbers for each set bit b of count: those that share count's bits above
    b, have 0 at b, and run through all lower bits. Reversed, such a block is an arithmetic progression.
    """
    points = 0
    for bit in range(count.bit_length()):
        if count >> bit & 1:
            first = _reverse((count >> (bit + 1)) << (bit + 1))
            step = 1 << (BITS - bit)
            points += min(max(-((first - bound) // step), 0), 1 << bit)
    return points
