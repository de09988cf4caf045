"""A number that is none stops every rank in the same step, and the message says where it came from."""

import math

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.config.errors import NonFiniteError
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.faults import check_finite

CPU = torch.device("cpu")
WORLD = ParallelState.alone().world


def test_finite_numbers_pass() -> None:
    check_finite(2.5, 1.0, True, 3, WORLD, CPU, None)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_step_rank_and_the_last_checkpoint(loss: float) -> None:
    with pytest.raises(NonFiniteError, match="step 7: the loss of rank 0 is not finite") as caught:
        check_finite(loss, 1.0, False, 7, WORLD, CPU, "step 5 in runs/x")
    assert "The last good checkpoint is step 5 in runs/x" in str(caught.value)
    assert "nothing was updated" in str(caught.value)
    assert caught.value.exit_code == 16


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_named_as_such(norm: float) -> None:
    with pytest.raises(NonFiniteError, match="step 2: a gradient is not finite") as caught:
        check_finite(2.5, norm, True, 2, WORLD, CPU, None)
    assert "No checkpoint has been written yet" in str(caught.value)


def find(rank: int, world_size: int, bad_ranks: list[int], bad_gradient: bool) -> list[str]:
    """What each of three steps says on this rank; something is wrong in the second one."""
    world = ParallelState.distributed(Grid(world_size, pp=2)).world
    told = []
    for step in (1, 2, 3):
        share = math.nan if step == 2 and rank in bad_ranks else 1.0
        loss = float(world.comm.all_reduce_(torch.tensor(share)))
        norm = math.inf if bad_gradient and step == 2 else 1.0
        try:
            check_finite(loss, norm, math.isfinite(share), step, world, CPU, None)
            told.append("")
        except NonFiniteError as error:
            told.append(str(error).split(" is not finite")[0])
    return told


@pytest.mark.parametrize(
    ("bad_ranks", "bad_gradient", "said"),
    [
        ([2], False, "step 2: the loss of rank 2"),
        ([1, 3], False, "step 2: the loss of ranks 1, 3"),
        ([], True, "step 2: a gradient"),
    ],
)
def test_all_ranks_stop_in_the_same_step_with_the_same_words(
    bad_ranks: list[int], bad_gradient: bool, said: str
) -> None:
    assert run_on_ranks(4, find, bad_ranks, bad_gradient) == [["", said, ""]] * 4
