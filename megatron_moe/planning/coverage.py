"""Whether the ranks of a world hold each number of a model exactly once in each copy of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import prod

from megatron_moe.parallel.communicator import Identity
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import ParamLayout, logical_pieces
from megatron_moe.parallel.state import ParallelState

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape
Stage = Sequence[tuple[str, ParamLayout]]  # the named parameters of what one pipeline rank holds
Copy = tuple[str, tuple[int, ...]]  # a logical tensor, and the places on the axes along which it is replicated


@dataclass
class Coverage:
    """What was found: problems, and what was looked at."""

    parameters: int = 0  # of all logical tensors, each once
    tensors: int = 0
    copies: int = 0  # of all of them, whole each
    pieces: int = 0
    problems: list[str] = field(default_factory=list)


def state_of(grid: Grid, rank: int) -> ParallelState:
    """Who a rank is, without anybody to talk to."""
    return ParallelState.build(grid, rank, lambda name, ranks, place: Identity())


def check_coverage(stages: Mapping[int, Stage], grid: Grid) -> Coverage:
    """Every rank's rectangles, put together.   stages: by pipeline rank; the same on all ranks of a stage."""
    found = Coverage()
    shapes: dict[str, tuple[int, ...]] = {}
    copies: dict[Copy, list[Rectangle]] = {}
    expected: dict[str, int] = {}
    for rank in range(grid.world_size):
        state = state_of(grid, rank)
        for name, layout in stages[state.pp.rank]:
            axes = [state.axis(axis) for axis in (layout.reduce_over, *layout.replica_axes)]
            places = tuple(axis.rank for axis in axes)
            for piece in logical_pieces(name, layout, state):
                if shapes.setdefault(piece.name, piece.global_shape) != piece.global_shape:
                    found.problems.append(f"{piece.name} has two shapes, {shapes[piece.name]} and {piece.global_shape}")
                copies.setdefault((piece.name, places), []).append((piece.offset, piece.shape))
                expected[piece.name] = prod(axis.size for axis in axes)
                found.pieces += 1
    found.problems += _gaps(copies, shapes)
    found.problems += _missing(copies, expected)
    found.tensors, found.copies = len(shapes), len(copies)
    found.parameters = sum(prod(shape) for shape in shapes.values())
    return found


def _gaps(copies: Mapping[Copy, Sequence[Rectangle]], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [
        f"{name}, copy {places}: {problem}"
        for (name, places), rectangles in copies.items()
        if (problem := tiling_problem(shapes[name], rectangles)) is not None
    ]


def _missing(copies: Iterable[Copy], expected: Mapping[str, int]) -> list[str]:
    """Each tensor has as many copies as its axes have places."""
    found = dict.fromkeys(expected, 0)
    for name, _ in copies:
        found[name] += 1
    wrong = [name for name, number in expected.items() if found[name] != number]
    return [f"{name} is there {found[name]} times, not {expected[name]}" for name in wrong]


def tiling_problem(shape: tuple[int, ...], rectangles: Sequence[Rectangle]) -> str | None:
    """None when the rectangles cover a tensor of that shape once: no gap, no overlap, nothing outside."""
    for offset, size in rectangles:
        if any(at < 0 or at + length > whole for at, length, whole in zip(offset, size, shape, strict=True)):
            return f"{size} at {offset} lies outside of {shape}"
    for one, other in combinations(rectangles, 2):
        if _overlap(one, other):
            return f"{one[1]} at {one[0]} overlaps {other[1]} at {other[0]}"
    covered = sum(prod(size) for _, size in rectangles)
    return None if covered == prod(shape) else f"{covered} of {prod(shape)} elements are held"


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return all(
        max(first, second) < min(first + size, second + extent)
        for first, size, second, extent in zip(*one, *other, strict=True)
    )
