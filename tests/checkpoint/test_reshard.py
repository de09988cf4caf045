"""Rectangle arithmetic against marking every element in an array."""

import random

import numpy as np

from megatron_moe.checkpoint.reshard import (
    Rectangle,
    RectangleIndex,
    first_hole,
    overlapping_pair,
    split_rectangle,
)
from tests.checkpoint.tilings import random_rectangle, random_shape, random_tiling

SEEDS = range(300)


def marked(shape: tuple[int, ...], rectangles: list[Rectangle]) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    counts = np.zeros(shape, dtype=np.int64)
    for rectangle in rectangles:
        counts[rectangle.slices_in(Rectangle.whole(shape))] += 1
    return counts


def test_intersection_and_difference_are_those_of_the_elements() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        shape = random_shape(rng)
        one, two = random_rectangle(rng, shape), random_rectangle(rng, shape)
        both = (marked(shape, [one]) > 0) & (marked(shape, [two]) > 0)
        common = one.intersect(two)
        assert np.array_equal(marked(shape, [common] if common else []) > 0, both)
        assert np.array_equal(marked(shape, one.subtract(two)), (marked(shape, [one]) > 0) & ~both)


def test_a_tiling_has_no_overlap_and_no_hole_and_a_spoilt_one_has() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        shape = random_shape(rng)
        tiles = random_tiling(rng, shape)
        assert overlapping_pair(tiles) is None
        assert first_hole(shape, tiles) is None
        missing = tiles.pop(rng.randrange(len(tiles)))
        hole = first_hole(shape, tiles)
        assert hole is not None and missing.intersect(hole) == hole
        extra = random_rectangle(rng, shape)
        pair = overlapping_pair([*tiles, extra])
        truly = (marked(shape, [*tiles, extra]) > 1).any()
        assert (pair is not None) == truly
        if pair:
            together = [*tiles, extra]
            assert together[pair[0]].intersect(together[pair[1]]) is not None


def test_the_index_finds_exactly_those_that_meet() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        shape = random_shape(rng)
        tiles = random_tiling(rng, shape)
        wanted = random_rectangle(rng, shape)
        expected = [index for index, tile in enumerate(tiles) if tile.intersect(wanted)]
        assert RectangleIndex(tiles).meeting(wanted) == expected


def test_split_parts_are_small_and_tile() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        shape = random_shape(rng)
        whole = random_rectangle(rng, shape)
        limit = rng.randint(1, 12)
        parts = list(split_rectangle(whole, limit))
        assert all(1 <= part.volume <= limit for part in parts)
        assert np.array_equal(marked(shape, parts), marked(shape, [whole]))


def test_a_scalar_is_one_element() -> None:
    scalar = Rectangle((), ())
    assert scalar.volume == 1
    assert scalar.intersect(scalar) == scalar
    assert scalar.subtract(scalar) == []
    assert overlapping_pair([scalar, scalar]) == (0, 1)
    assert first_hole((), []) == scalar
    assert RectangleIndex([scalar]).meeting(scalar) == [0]


def test_what_lies_outside_does_not_fit() -> None:
    assert Rectangle((1, 0), (2, 3)).fits((3, 3))
    assert not Rectangle((2, 0), (2, 3)).fits((3, 3))
    assert not Rectangle((-1, 0), (2, 3)).fits((3, 3))
    assert not Rectangle((0,), (3,)).fits((3, 3))
    assert not Rectangle((0, 0), (3, -1)).fits((3, 3))
