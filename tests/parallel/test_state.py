"""The axes of a rank, alone, recorded and joined."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from megatron_moe.parallel.communicator import Identity
from megatron_moe.parallel.grid import AXIS_RANKS, Grid
from megatron_moe.parallel.state import Groups, ParallelState

SIZES = {"tp": 2, "pp": 2, "ep": 4, "ep_ranks_per_node": 2}


def test_a_world_of_one_needs_nobody() -> None:
    state = ParallelState.alone()
    for name in (*AXIS_RANKS, "pp_back"):
        axis = state.axis(name)
        assert (axis.size, axis.rank, axis.ranks) == (1, 0, (0,))
        assert isinstance(axis.comm, Identity)
        assert axis.is_first and axis.is_last


def test_any_rank_of_a_large_world_knows_its_places() -> None:
    grid = Grid(1024, tp=4, cp=2, pp=8, ep=16)
    for rank in (0, 517, 1023):
        state, tallies = ParallelState.recorded(grid, rank)
        assert state.rank == rank
        for name in AXIS_RANKS:
            axis = state.axis(name)
            assert axis.ranks == grid.axis_ranks(name, rank)
            assert axis.ranks[axis.rank] == rank
            assert axis.name == name
        assert state.pp_back.ranks == state.pp.ranks
        state.ep.comm.all_reduce_(torch.empty(16, device="meta"))
        assert tallies["ep"].calls == {"all_reduce": 1}
        assert tallies["tp"].calls == {}


def sums(rank: int, world_size: int) -> dict[str, float]:
    """The sum of all world ranks along each axis."""
    state = ParallelState.distributed(Grid(world_size, **SIZES))
    names = (*AXIS_RANKS, "pp_back")
    return {name: float(state.axis(name).comm.all_reduce_(torch.tensor([float(rank)]))) for name in names}


def test_joined_ranks_talk_along_their_axes() -> None:
    grid = Grid(8, **SIZES)
    for rank, found in enumerate(run_on_ranks(8, sums)):
        for name, total in found.items():
            assert total == math.fsum(grid.axis_ranks(name.removesuffix("_back"), rank)), (rank, name)


def groups_made(rank: int, world_size: int, grids: list[Grid]) -> list[int]:
    """How many process groups each of these worlds makes."""
    made, right = [], dist.new_group

    def counted(ranks: list[int]) -> dist.ProcessGroup:
        made[-1] += 1
        return right(ranks)

    dist.new_group = counted
    for grid in grids:
        made.append(0)
        ParallelState.distributed(grid)
    return made


def test_a_world_that_does_not_tell_nodes_apart_makes_no_group_for_them() -> None:
    grids = [Grid(4, ep=4, ep_ranks_per_node=number) for number in (None, 4, 2)]
    # all ranks, and all ranks for their gradients; on two nodes also each node, and each place in them
    assert run_on_ranks(4, groups_made, grids) == [[2, 2, 6]] * 4


def groups_made_again(rank: int, world_size: int) -> list[int]:
    known: Groups = {}
    found = []
    for grid in (Grid(4), Grid(4, ep=4), Grid(4, tp=2), Grid(4, tp=2, cp=2)):
        state = ParallelState.distributed(grid, known=known)
        assert float(state.tp_cp.comm.all_reduce_(torch.ones(1))) == state.tp_cp.size
        found.append(len(known))
    return found


def test_grids_of_a_world_share_their_groups() -> None:
    # all ranks twice; nothing more for experts; pairs for tp, for dp and, of replicas, for dp_cp; cp as dp before
    assert run_on_ranks(4, groups_made_again) == [[2, 2, 8, 8]] * 4


def test_a_rank_alone_has_nobody_to_talk_to() -> None:
    comm = ParallelState.alone().pp.comm
    with pytest.raises(RuntimeError, match="nobody to send to"):
        comm.send(torch.zeros(1), 1)
    with pytest.raises(RuntimeError, match="nobody to receive from"):
        comm.receive_(torch.zeros(1), 1)
