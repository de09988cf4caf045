"""Ranks that do not mean each other, or do not say the same, are found."""

from dataclasses import dataclass

import pytest

from megatron_moe.parallel.grid import Grid
from megatron_moe.pipeline.actions import Pipeline
from megatron_moe.pipeline.schedules import SCHEDULES
from megatron_moe.planning.agreement import (
    AXES,
    Diary,
    axis_problems,
    collective_problems,
    sent_and_received,
    transfer_problems,
)

GRIDS = [
    Grid(1),
    Grid(24, tp=2, cp=3, pp=2, ep=4),
    Grid(32, tp=4, pp=2, ep=2, etp=4, embedding_places=(0, 1)),
    Grid(64, pp=8, ep=8, embedding_places=(0, 3, 7)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_axis_of_a_grid_is_the_same_to_all_its_ranks(grid: Grid) -> None:
    assert axis_problems(grid) == []


@dataclass(frozen=True)
class _Lopsided(Grid):
    """Rank 3 thinks that it shares tp with rank 0."""

    def axis_ranks(self, name: str, rank: int) -> tuple[int, ...]:
        return (0, 3) if (name, rank) == ("tp", 3) else super().axis_ranks(name, rank)


@dataclass(frozen=True)
class _Absent(Grid):
    """Rank 1 is not on its own axis dp."""

    def axis_ranks(self, name: str, rank: int) -> tuple[int, ...]:
        return (0, 2) if (name, rank) == ("dp", 1) else super().axis_ranks(name, rank)


def test_ranks_that_list_each_other_on_one_side_only_are_found() -> None:
    assert any("rank 3 lists 0 on tp" in found for found in axis_problems(_Lopsided(4, tp=2)))
    assert "dp of rank 1 is (0, 2)" in axis_problems(_Absent(4, tp=2))


EDGES = {1: {"hidden": 8}, 2: {"memory": 12}, 3: {"hidden": 8, "memory": 12}}


@pytest.mark.parametrize("name", ["1f1b", "1f1b_split", "sequential"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_a_schedule_sends_is_awaited_in_the_same_order(name: str, ranks: int) -> None:
    shape = Pipeline(ranks, 6)
    lists = SCHEDULES[name](shape)
    assert transfer_problems(lists, shape, [EDGES] * ranks) == []
    sends = [len(sent_and_received(entries, shape, EDGES)[0]) for entries in lists]
    assert sum(sends) == 2 * 6 * sum(len(EDGES[stage]) for stage in range(1, ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_several_stages_a_rank_pass_from_the_last_to_the_first(ranks: int) -> None:
    shape = Pipeline(ranks, 4, 4 // ranks)
    lists = SCHEDULES["interleaved"](shape)
    assert transfer_problems(lists, shape, [EDGES] * ranks) == []
    channels = {one.channel for entries in lists for one in sent_and_received(entries, shape, EDGES)[0]}
    assert channels == (set() if ranks == 1 else {"pp", "pp_back", "pp_wrap", "pp_wrap_back"})


def test_another_shape_and_another_order_are_found() -> None:
    shape = Pipeline(4, 6)
    lists = SCHEDULES["1f1b"](shape)
    larger = {**EDGES, 2: {"memory": 16}}
    problems = transfer_problems(lists, shape, [EDGES, EDGES, larger, EDGES])
    assert [problem.partition(":")[0] for problem in problems] == ["pp, place 1 to 2", "pp_back, place 2 to 1"]
    turned = [*lists[:3], [lists[3][2], lists[3][1], lists[3][0], *lists[3][3:]]]
    assert any(problem.startswith("pp, place 2 to 3") for problem in transfer_problems(turned, shape, [EDGES] * 4))


def test_stages_that_call_different_collectives_are_found() -> None:
    grid = Grid(8, pp=4, tp=2, embedding_places=(0, 2))
    diaries = {place: {name: Diary() for name in AXES} for place in range(4)}
    for place in range(4):
        diaries[place]["pp"].add("all_reduce", 64)
        diaries[place]["dp_cp"].add("all_reduce", place)  # within a stage: nobody else's business
    for place in (0, 2):
        diaries[place]["embedding"].add("all_reduce", 32)
    assert collective_problems(grid, diaries) == []
    diaries[2]["embedding"].add("all_gather", 32)
    assert [problem.partition(":")[0] for problem in collective_problems(grid, diaries)] == ["embedding"]
    assert diaries[2]["embedding"].entries == [("all_reduce", 32), ("all_gather", 32)]
