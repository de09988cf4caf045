"""Who shares an axis with whom: against an array of ranks that is reshaped, and an example written out."""

import numpy as np
import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.parallel.grid import AXIS_RANKS, Grid

GRIDS = [
    Grid(1),
    Grid(8, tp=2, pp=2, ep=2),
    Grid(8, tp=2, cp=2, ep=4, etp=2),
    Grid(12, tp=3, pp=2, ep=2, etp=3),
    Grid(16, tp=2, cp=2, pp=2, ep=8),
    Grid(24, cp=2, pp=3, ep=4, etp=2),
    Grid(16, tp=4, ep=2, etp=1),
    Grid(6, pp=6),
    Grid(16, tp=2, ep=8, ep_ranks_per_node=4),
    Grid(24, pp=2, ep=6, etp=2, ep_ranks_per_node=2),
]
DENSE, EXPERT = ("pp", "dp", "cp", "tp"), ("pp", "edp", "ep", "etp")
BY_NODE = ("pp", "edp", "ep_node", "ep_local", "etp")
VIEWS = {
    **{name: (DENSE, {name}) for name in DENSE},
    **{name: (EXPERT, {name}) for name in EXPERT[1:]},
    "ep_node": (BY_NODE, {"ep_node"}),
    "ep_local": (BY_NODE, {"ep_local"}),
    "dp_cp": (DENSE, {"dp", "cp"}),
    "tp_cp": (DENSE, {"cp", "tp"}),
    "stage": (DENSE, {"dp", "cp", "tp"}),
    "world": (DENSE, set(DENSE)),
}


def expected_groups(grid: Grid, name: str) -> set[tuple[int, ...]]:
    """The groups of an axis by reshaping 0..world-1 to the grid."""
    axes, free = VIEWS[name]
    ranks = np.arange(grid.world_size).reshape([getattr(grid, axis) for axis in axes])
    kept = [place for place, axis in enumerate(axes) if axis in free]
    last = np.moveaxis(ranks, kept, range(len(axes) - len(kept), len(axes)))
    size = int(np.prod([ranks.shape[place] for place in kept]))
    return {tuple(group) for group in last.reshape(-1, size).tolist()}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_groups_are_those_of_the_reshaped_ranks(grid: Grid, name: str) -> None:
    assert {grid.axis_ranks(name, rank) for rank in range(grid.world_size)} == expected_groups(grid, name)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", AXIS_RANKS)
def test_every_rank_is_in_exactly_one_group_which_all_its_members_know(grid: Grid, name: str) -> None:
    for rank in range(grid.world_size):
        group = grid.axis_ranks(name, rank)
        assert rank in group
        assert list(group) == sorted(set(group))
        assert all(grid.axis_ranks(name, member) == group for member in group)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sizes_multiply_to_the_world(grid: Grid) -> None:
    assert grid.pp * grid.dp * grid.cp * grid.tp == grid.world_size
    assert grid.pp * grid.edp * grid.ep * grid.etp == grid.world_size
    assert len({grid.dense_coordinates(rank) for rank in range(grid.world_size)}) == grid.world_size
    assert len({grid.expert_coordinates(rank) for rank in range(grid.world_size)}) == grid.world_size


def test_eight_ranks_by_hand() -> None:
    """Tensor 2 x pipeline 2 x data 2, experts over 2."""
    grid = Grid(8, tp=2, pp=2, ep=2)
    groups = {name: sorted({grid.axis_ranks(name, rank) for rank in range(8)}) for name in AXIS_RANKS}
    assert groups["tp"] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups["dp"] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert groups["pp"] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert groups["cp"] == [(rank,) for rank in range(8)]
    assert groups["ep"] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert groups["edp"] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert groups["stage"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert groups["embedding"] == groups["pp"]
    # not told apart: one node
    assert groups["ep_local"] == groups["ep"] and groups["ep_node"] == groups["cp"]


def test_experts_fold_over_context_and_data_by_hand() -> None:
    """Tensor 2 x context 2 x data 2; experts over 4, each of them whole."""
    grid = Grid(8, tp=2, cp=2, ep=4)
    assert grid.axis_ranks("ep", 5) == (4, 5, 6, 7)
    assert grid.axis_ranks("edp", 5) == (1, 5)
    assert grid.axis_ranks("cp", 5) == (5, 7)
    assert grid.axis_ranks("tp_cp", 5) == (4, 5, 6, 7)
    assert grid.axis_ranks("dp_cp", 5) == (1, 3, 5, 7)


def test_one_nodes_part_of_the_experts_is_a_run_of_ranks_by_hand() -> None:
    """Experts over 4 ranks on 2 nodes, each cut in 2: nodes 0-3 and 4-7, and 8-11 and 12-15 for the other copy."""
    grid = Grid(16, ep=4, etp=2, ep_ranks_per_node=2)
    assert grid.axis_ranks("ep", 5) == (1, 3, 5, 7)
    assert grid.axis_ranks("ep_local", 5) == (5, 7)
    assert grid.axis_ranks("ep_node", 5) == (1, 5)
    assert grid.axis_ranks("etp", 5) == (4, 5)
    assert grid.axis_ranks("ep_node", 14) == (10, 14)


def test_only_the_ends_of_a_pipeline_share_the_embedding() -> None:
    grid = Grid(8, pp=4, tp=2)
    assert [grid.axis_ranks("embedding", rank) for rank in (0, 2, 5, 7)] == [(0, 6), (2,), (5,), (1, 7)]
    assert Grid(2, tp=2).axis_ranks("embedding", 1) == (1,)


@pytest.mark.parametrize(
    ("world_size", "sizes", "said"),
    [
        (6, {"tp": 4}, "6 ranks cannot be split over tensor 4 x context 1 x pipeline 1; use a multiple of 4"),
        (8, {"tp": 2, "ep": 3}, "8 ranks of a pipeline stage cannot be split over --expert-model-parallel-size 3"),
        (8, {"pp": 2, "ep": 8}, "use a product that divides 4"),
        (
            8,
            {"ep": 4, "ep_ranks_per_node": 3},
            "--expert-model-parallel-size 4 cannot be split over --expert-model-parallel-ranks-per-node 3; "
            "use a number that divides 4",
        ),
    ],
)
def test_sizes_that_do_not_multiply_to_the_world_are_refused(world_size: int, sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Grid(world_size, **sizes)
