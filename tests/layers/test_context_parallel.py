"""How a sequence is cut, and put together again."""

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.layers.context_parallel import context_rows, gather_sequence, own_chunks, sequence_order
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState

CPU = torch.device("cpu")


def test_two_ranks_by_hand() -> None:
    assert context_rows(8, 2, 0, CPU).tolist() == [0, 1, 6, 7]
    assert context_rows(8, 2, 1, CPU).tolist() == [2, 3, 4, 5]
    assert context_rows(5, 1, 0, CPU).tolist() == [0, 1, 2, 3, 4]
    assert (own_chunks(2, 0), own_chunks(2, 1)) == ((0, 3), (1, 2))
    assert sequence_order(8, 2, CPU).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_row_is_held_once_and_causal_work_is_even(size: int) -> None:
    length = 24
    held = [context_rows(length, size, rank, CPU) for rank in range(size)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    work = {int((rows + 1).sum()) for rows in held}  # row i looks at i + 1 keys
    assert len(work) == 1


def test_a_sequence_that_is_not_cut_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 6 is not cut evenly over 2"):
        context_rows(6, 2, 0, CPU)


def gather(rank: int, world_size: int) -> None:
    cp = ParallelState.distributed(Grid(world_size, cp=world_size)).cp
    whole = torch.arange(24.0).view(12, 2)
    rows = context_rows(12, world_size, rank, CPU)
    local = whole[rows].requires_grad_()
    gathered = gather_sequence(local, cp, 12)
    assert torch.equal(gathered, whole)
    # rank r uses row i with weight (r + 1) · i: the gradient is summed over the ranks
    (gathered * torch.arange(12.0)[:, None] * (rank + 1)).sum().backward()
    factor = sum(range(1, world_size + 1))
    assert local.grad is not None
    assert torch.equal(local.grad, (rows * factor)[:, None].expand(-1, 2).float())


def test_ranks_gather_the_sequence_in_its_order_with_gradients_summed() -> None:
    run_on_ranks(3, gather)


def test_alone_the_sequence_is_whole() -> None:
    local = torch.zeros(4, 1)
    assert gather_sequence(local, ParallelState.alone().cp, 4) is local
