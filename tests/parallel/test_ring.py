"""Blocks go round, what is added to them comes home, and what goes on the wire is counted."""

import torch
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.ring import Homeward, visitors
from megatron_moe.parallel.state import Axis, ParallelState


def block_of(rank: int) -> Tensor:
    return torch.tensor([[10.0 * rank, 1.0], [2.0, rank]])


def travel(axis: Axis) -> tuple[list[int], Tensor]:
    """Each rank adds (its number + 1) x the visitor to the visitor's sum."""
    met, home = [], Homeward(axis)
    # not contiguous: what is sent must be, what is at hand need not
    for sender, block in visitors(block_of(axis.rank).t().contiguous().t(), axis):
        assert torch.equal(block, block_of(sender))
        met.append(sender)
        home.add(block * (axis.rank + 1))
    return met, home.total()


def go_round(rank: int, world_size: int) -> list[int]:
    state = ParallelState.distributed(Grid(world_size, cp=world_size))
    met, total = travel(state.cp)
    assert torch.equal(total, block_of(rank) * sum(range(1, world_size + 1)))
    return met


def test_each_rank_meets_all_blocks_its_own_first_and_sums_come_home() -> None:
    assert run_on_ranks(2, go_round) == [[0, 1], [1, 0]]
    assert run_on_ranks(4, go_round) == [[0, 3, 2, 1], [1, 0, 3, 2], [2, 1, 0, 3], [3, 2, 1, 0]]


def test_alone_nothing_travels() -> None:
    met, total = travel(ParallelState.alone().cp)
    assert met == [0] and torch.equal(total, block_of(0))


def test_blocks_and_sums_make_one_hop_less_than_there_are_ranks() -> None:
    state, tallies = ParallelState.recorded(Grid(4, cp=4), 2)
    home = Homeward(state.cp)
    for _, block in visitors(torch.empty(3, 5, device="meta"), state.cp):
        home.add(torch.empty_like(block, dtype=torch.float64))
    assert home.total().shape == (3, 5)
    assert tallies["cp"].calls == {"send_receive": 6}
    assert tallies["cp"].sent_bytes == {"send_receive": 3 * 15 * 4 + 3 * 15 * 8}
