"""An error of one rank becomes the same error on all ranks, and nobody waits."""

import errno

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.config.errors import ConfigError, DataError, MegatronMoEError, StorageError
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.together import together

CPU = torch.device("cpu")


def fail(rank: int, world_size: int, failing: dict[int, Exception]) -> str:
    """What a rank that fails alone, or not at all, raises in the end."""
    world = ParallelState.distributed(Grid(world_size)).world
    try:
        with together(world, CPU):
            if rank in failing:
                raise failing[rank]
    except MegatronMoEError as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"
    return "went on"


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ({}, "went on"),
        ({1: DataError("no corpus")}, "DataError 65: rank 1: no corpus"),
        ({rank: ConfigError("no share") for rank in range(3)}, "ConfigError 2: no share"),
        ({1: DataError("first"), 2: ConfigError("second")}, "DataError 65: rank 1: first"),
        (
            {2: OSError(errno.ENOSPC, "No space left on device", "log")},
            "StorageError 74: rank 2: [Errno 28] No space left on device: 'log'; free some room, or name a place that "
            "every rank can use.",
        ),
    ],
    ids=["none", "one", "all alike", "two kinds", "disk"],
)
def test_all_ranks_raise_what_one_found(failing: dict[int, Exception], expected: str) -> None:
    assert run_on_ranks(3, fail, failing) == [expected] * 3


def test_a_rank_alone_raises_its_own_error() -> None:
    world = ParallelState.alone().world
    with pytest.raises(DataError, match="^no corpus$"), together(world, CPU):
        raise DataError("no corpus")
    with pytest.raises(StorageError, match="free some room"), together(world, CPU):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_mistake_in_the_program_is_not_dressed_up() -> None:
    with pytest.raises(KeyError), together(ParallelState.alone().world, CPU):
        raise KeyError("layout")
