"""Rectangles of a tensor: where two overlap, whether many tile the whole, what is left over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rectangle:
    """The elements offset..offset+shape of a tensor, in each dimension; a scalar has no dimensions and volume 1."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Rectangle":
        return cls((0,) * len(shape), shape)

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(start + length for start, length in zip(self.offset, self.shape, strict=True))

    @property
    def volume(self) -> int:
        return prod(self.shape)

    def slices_in(self, outer: "Rectangle") -> tuple[slice, ...]:
        """How to index a tensor that holds `outer` so as to get this part of it."""
        return tuple(
            slice(start - base, start - base + length)
            for start, length, base in zip(self.offset, self.shape, outer.offset, strict=True)
        )

    def intersect(self, other: "Rectangle") -> "Rectangle | None":
        """What both hold; None when that is nothing."""
        start = tuple(map(max, self.offset, other.offset))
        shape = tuple(end - begin for begin, end in zip(start, map(min, self.stop, other.stop), strict=True))
        return Rectangle(start, shape) if all(length > 0 for length in shape) else None

    def subtract(self, other: "Rectangle") -> list["Rectangle"]:
        """What is left of this one without the other, as at most two rectangles for each dimension."""
        common = self.intersect(other)
        if common is None:
            return [self]
        left = []
        offset, stop = list(self.offset), list(self.stop)
        for dim, (begin, end) in enumerate(zip(common.offset, common.stop, strict=True)):
            # cut off what lies before and after the common part along this dimension, then go on with the middle
            for low, high in ((offset[dim], begin), (end, stop[dim])):
                if low < high:
                    edge = list(zip(offset, stop, strict=True))
                    edge[dim] = (low, high)
                    left.append(Rectangle(tuple(a for a, _ in edge), tuple(b - a for a, b in edge)))
            offset[dim], stop[dim] = begin, end
        return left

    def fits(self, shape: tuple[int, ...]) -> bool:
        """True if it lies inside a tensor of this shape."""
        if not len(self.offset) == len(self.shape) == len(shape):
            return False
        edges = zip(self.offset, self.stop, shape, strict=True)
        return all(0 <= start <= stop <= limit for start, stop, limit in edges)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.offset, self.stop, strict=True)) + "]"


class RectangleIndex:
    """Many rectangles of one tensor, asked which of them meet a given one."""

    def __init__(self, rectangles: Sequence[Rectangle]) -> None:
        # the reshape keeps (count, 0) for scalars
        form = (len(rectangles), len(rectangles[0].offset) if rectangles else 0)
        self._starts: NDArray[np.int64] = np.array([r.offset for r in rectangles], dtype=np.int64).reshape(form)
        self._stops: NDArray[np.int64] = np.array([r.stop for r in rectangles], dtype=np.int64).reshape(form)

    def meeting(self, other: Rectangle) -> list[int]:
        """Numbers of the rectangles that have an element in common with `other`."""
        begin = np.maximum(self._starts, np.array(other.offset, dtype=np.int64))
        end = np.minimum(self._stops, np.array(other.stop, dtype=np.int64))
        found: list[int] = np.flatnonzero((begin < end).all(axis=1)).tolist()
        return found


def overlapping_pair(rectangles: Sequence[Rectangle]) -> tuple[int, int] | None:
    """Two that share an element, or None. A sweep along dim 0: only those still open there are compared."""
    if len(rectangles) < 2:
        return None
    if not rectangles[0].offset:
        return 0, 1
    order = sorted(range(len(rectangles)), key=lambda index: rectangles[index].offset[0])
    starts = np.array([rectangles[index].offset for index in order], dtype=np.int64)
    stops = np.array([rectangles[index].stop for index in order], dtype=np.int64)
    last = np.searchsorted(starts[:, 0], stops[:, 0], side="left")
    for place in range(len(order) - 1):
        rivals = slice(place + 1, last[place])
        clash = ((starts[rivals] < stops[place]) & (stops[rivals] > starts[place])).all(axis=1)
        if clash.any():
            first, second = sorted((order[place], order[place + 1 + int(clash.argmax())]))
            return first, second
    return None


def first_hole(shape: tuple[int, ...], rectangles: Sequence[Rectangle]) -> Rectangle | None:
    """A part of a tensor of this shape that none of them holds, or None. Slow: for error messages."""
    rest = [Rectangle.whole(shape)] if prod(shape) else []
    for rectangle in rectangles:
        rest = [left for part in rest for left in part.subtract(rectangle)]
    return min(rest, key=lambda part: part.offset) if rest else None


def split_rectangle(rectangle: Rectangle, limit: int) -> Iterator[Rectangle]:
    """Parts of at most `limit` elements (at least one), in row-major order, that tile it."""
    if rectangle.volume <= limit or not rectangle.shape:
        yield rectangle
        return
    dim = next(dim for dim, length in enumerate(rectangle.shape) if length > 1)
    rows = max(1, limit * rectangle.shape[dim] // rectangle.volume)
    for start in range(0, rectangle.shape[dim], rows):
        offset, shape = list(rectangle.offset), list(rectangle.shape)
        offset[dim] += start
        shape[dim] = min(rows, rectangle.shape[dim] - start)
        yield from split_rectangle(Rectangle(tuple(offset), tuple(shape)), limit)
