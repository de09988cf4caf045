"""Gathers and sums in pieces against their definitions, and the order in which work and transfers alternate."""

from collections.abc import Sequence

import pytest
import torch
from delayed import late
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.parallel.collectives import shares
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.in_pieces import places, rows_as_they_come, start_split_sum, start_whole_sum
from megatron_moe.parallel.state import Axis, ParallelState

TOTALS = (9, 7, 2, 1, 0)  # even on three ranks; uneven; empty on one; empty on all but one; empty


def own_part(total: int, rank: int) -> Tensor:
    """What a rank brings to a sum of (total, 2)."""
    return torch.randn(total, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def axis_of(world_size: int) -> Axis:
    return ParallelState.distributed(Grid(world_size, tp=world_size)).tp


def test_places_follow_each_other() -> None:
    assert places([3, 0, 2]) == [slice(0, 3), slice(3, 3), slice(3, 5)]


def gather(rank: int, world_size: int, totals: Sequence[int]) -> None:
    axis = axis_of(world_size)
    for total in totals:
        whole, rows = own_part(total, 0), shares(total, world_size)
        found = list(rows_as_they_come(whole[places(rows)[rank]], axis, rows))
        assert found[0][0] == rank
        assert sorted(source for source, _ in found) == list(range(world_size))
        assert torch.equal(torch.cat([piece for _, piece in sorted(found, key=lambda pair: pair[0])]), whole)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_rows_come_and_the_own_ones_first(world_size: int) -> None:
    run_on_ranks(world_size, gather, TOTALS)


def sums(rank: int, world_size: int, totals: Sequence[int]) -> None:
    axis = axis_of(world_size)
    for total in totals:
        parts, rows = [own_part(total, other) for other in range(world_size)], shares(total, world_size)
        wanted, mine = torch.stack(parts).sum(0), parts[rank].clone()
        split = start_split_sum(lambda part, mine=mine: mine[part].clone(), axis, rows).wait()  # type: ignore[misc]
        torch.testing.assert_close(split, wanted[places(rows)[rank]])
        again = start_split_sum(lambda part, mine=mine: mine[part].clone(), axis, rows).wait()  # type: ignore[misc]
        assert torch.equal(split, again)
        whole = start_whole_sum(mine, lambda part, mine=mine: mine[part], axis).wait()  # type: ignore[misc]
        assert whole is mine
        torch.testing.assert_close(whole, wanted)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sums_in_pieces_are_sums(world_size: int) -> None:
    run_on_ranks(world_size, sums, TOTALS)


def order(rank: int, world_size: int) -> None:
    axis, comm = late(axis_of(world_size), 0.0)
    begun: list[tuple[slice, int]] = []

    def make(part: slice) -> Tensor:
        begun.append((part, comm.delayed))
        return torch.ones(part.stop - part.start, 2)

    rows = shares(7, world_size)
    start_split_sum(make, axis, rows).wait()
    # what was made is on its way before the next is made; the own rows come last
    assert [started for _, started in begun] == list(range(world_size))
    assert begun[-1][0] == places(rows)[rank]
    begun.clear()
    comm.delayed = 0
    start_whole_sum(torch.zeros(7, 2), make, axis).wait()
    assert [started for _, started in begun] == list(range(len(begun))) and len(begun) > 1
    comm.delayed = 0
    coming = rows_as_they_come(torch.ones(rows[rank], 2), axis, rows)
    next(coming)
    assert comm.delayed == world_size - 1  # all are on their way while the own rows are used
    list(coming)


def test_a_piece_travels_while_the_next_is_made() -> None:
    run_on_ranks(3, order)
