"""What a number of ranks demands, against brute force over small worlds."""

import re
from itertools import product
from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.world import check_world
from tests.config.example import dense, sparse

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
CP, EP = "parallel.context_parallel_size", "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"


def fits(config: RunConfig, world_size: int) -> bool:
    try:
        check_world(config, world_size)
    except ConfigError:
        return False
    return True


def grid_exists(world: int, tp: int, cp: int, pp: int, ep: int, etp: int) -> bool:
    """By search for the data-parallel sizes that fill the world in both views."""
    dense_view = any(dp * cp * tp * pp == world for dp in range(1, world + 1))
    expert_view = any(edp * ep * etp * pp == world for edp in range(1, world + 1))
    return dense_view and expert_view


def test_the_check_agrees_with_a_search_for_the_grid() -> None:
    for tp, cp, pp, ep, etp in product((1, 2), (1, 2), (1, 2), (1, 2, 4), (1, 2)):
        config = sparse({TP: tp, CP: cp, PP: pp, EP: ep, ETP: etp, "training.global_batch_size": 5040})
        for world in range(1, 17):
            whole = grid_exists(world, tp, cp, pp, ep, etp)
            # 5040 is a multiple of every number of copies up to 10, of 12, 14, 15 and 16
            copies = world // (tp * cp * pp)
            assert fits(config, world) == (whole and 5040 % copies == 0)


def test_experts_fold_over_tensor_ranks() -> None:
    folded = sparse({TP: 4, EP: 4, ETP: 1})
    check_world(folded, 4)
    check_world(sparse({PP: 2, EP: 2}), 4)
    assert not fits(sparse({PP: 4, EP: 2}), 4)


CASES: list[tuple[dict[str, Any], int, str]] = [
    (
        {TP: 2, PP: 2},
        6,
        "6 ranks cannot be shared out over --tensor-model-parallel-size 2 x --pipeline-model-parallel-size 2 x "
        "--context-parallel-size 1 = 4; use a multiple of 4 ranks, such as 8, or sizes whose product is 1, 2, 3 or 6.",
    ),
    ({TP: 2}, 1, "use a multiple of 2 ranks, such as 2, or sizes whose product is 1."),
    ({TP: 2}, 0, "use a multiple of 2 ranks, such as 2."),
    (
        {EP: 8},
        4,
        "the 4 ranks of a pipeline stage cannot be shared out over --expert-model-parallel-size 8 x "
        "--expert-tensor-parallel-size 1 = 8; use an expert size of 1, 2 or 4, or a multiple of 8 ranks per stage.",
    ),
    ({ETP: 4}, 2, "use an expert tensor size of 1 or 2, or a multiple of 4 ranks per stage."),
    (
        {"training.global_batch_size": 12, "training.micro_batch_size": 2},
        4,
        "--global-batch-size 12 is no multiple of --micro-batch-size 2 x 4 data-parallel ranks = 8; "
        "use --global-batch-size 8 or 16, or --micro-batch-size 1 or 3.",
    ),
    ({}, 16, "= 16; use --global-batch-size 16."),
    ({"parallel.debug_collectives": True}, 1, "--debug-collectives has no effect with one rank"),
    ({"training.global_batch_size": 10, "training.micro_batch_size": 2}, 4, "= 8; use --global-batch-size 8 or 16."),
    # 3 samples for each rank do not hold whole groups of 2
    (
        {"training.global_batch_size": 12, "training.micro_batch_size": 2, "moe.routing_group_samples": 2},
        4,
        "= 8; use --global-batch-size 8 or 16.",
    ),
    (
        {
            "training.global_batch_size": 24,
            "training.micro_batch_size": 4,
            "moe.routing_group_samples": 2,
        },
        4,
        "use --global-batch-size 16 or 32, or --micro-batch-size 2 or 6.",
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "message"), CASES)
def test_a_world_that_does_not_fit_is_told_what_would(changes: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(sparse(changes), world_size)
    assert message in str(caught.value)


@pytest.mark.parametrize("world_size", [2, 3, 5, 6, 7])
def test_the_expert_sizes_that_are_offered_are_legal(world_size: int) -> None:
    batch = {"training.global_batch_size": 420}
    with pytest.raises(ConfigError) as caught:
        check_world(sparse({EP: 8, **batch}), world_size)
    offered = re.search(r"use an expert size of ([0-9, or]+), or a multiple", str(caught.value))
    assert offered is not None
    sizes = [int(size) for size in re.findall(r"\d+", offered.group(1))]
    assert sizes and all(fits(sparse({EP: size, **batch}), world_size) for size in sizes)


def test_a_dense_model_has_no_expert_view() -> None:
    check_world(dense({TP: 2}), 2)
