"""Every number once in each copy; a gap, an overlap or a copy too few is found."""

from dataclasses import replace

import pytest
from planning.models import ENCODER_DECODER, VOCAB, small

from megatron_moe.models.build import build_stages, gpt_spec
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import layout_of
from megatron_moe.planning.coverage import Rectangle, Stage, check_coverage, state_of, tiling_problem
from megatron_moe.training.engine import grid_of

PARALLEL = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 4,
    "expert_tensor_parallel_size": 1,
}


def _world() -> tuple[dict[int, Stage], Grid]:
    config = small(ENCODER_DECODER, PARALLEL)
    grid = grid_of(config, 16)
    stages: dict[int, Stage] = {}
    for place in range(grid.pp):
        built = build_stages(gpt_spec(config, VOCAB), state_of(grid, place * grid.stage_size))
        stages[place] = [(name, layout_of(weight)) for stage in built for name, weight in stage.named_parameters()]
    return stages, grid


def test_a_world_holds_each_number_once_in_each_copy() -> None:
    stages, grid = _world()
    found = check_coverage(stages, grid)
    assert found.problems == []
    alone = build_stages(gpt_spec(small(ENCODER_DECODER), VOCAB), state_of(Grid(1), 0))
    assert found.parameters == sum(weight.numel() for stage in alone for weight in stage.parameters())
    # a stage is of eight ranks: a weight split over two of tp has four copies, an expert over four of ep two
    assert found.copies < found.pieces


@pytest.mark.parametrize(
    ("leaf", "splits", "problem"),
    [("experts.w1", {0: "edp", 2: "etp"}, "is there 4 times, not 8"), ("output", {1: "dp"}, "elements are held")],
)
def test_a_layout_that_says_something_else_is_found(leaf: str, splits: dict[int, str], problem: str) -> None:
    stages, grid = _world()
    name = next(name for name, _ in stages[0] if name.endswith(leaf))
    stages[0] = [
        (other, replace(layout, splits=splits) if other == name else layout) for other, layout in stages[0]
    ]
    assert any(problem in found for found in check_coverage(stages, grid).problems)


def test_a_tensor_of_two_shapes_is_found() -> None:
    stages, grid = _world()
    # the tables of relative positions stand in every stage
    changed = [
        (name, replace(layout, global_shape=(8, 4)) if name.startswith("relative_bias") else layout)
        for name, layout in stages[1]
    ]
    assert any("has two shapes" in found for found in check_coverage({0: stages[0], 1: changed}, grid).problems)


@pytest.mark.parametrize(
    ("rectangles", "problem"),
    [
        ([((0, 0), (2, 4)), ((2, 0), (2, 4))], None),
        ([((0, 0), (3, 2)), ((0, 2), (3, 2)), ((3, 0), (1, 4))], None),
        ([((0, 0), (2, 4))], "8 of 16 elements"),
        ([((0, 0), (4, 3)), ((0, 2), (4, 2))], "overlaps"),
        ([((0, 0), (4, 4)), ((0, 0), (4, 4))], "overlaps"),
        ([((0, 1), (4, 4))], "outside"),
    ],
)
def test_tiles_leave_no_gap_and_no_overlap(rectangles: list[Rectangle], problem: str | None) -> None:
    found = tiling_problem((4, 4), rectangles)
    assert found is None if problem is None else problem in (found or "")
