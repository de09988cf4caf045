"""All-to-all attention against the softmax of whole sequences, and what it sends."""

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.layers.all_to_all_attention import AllToAllAttention
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from tests.layers.sequence_cases import CASES, GROUPS, PER_GROUP, WIDTH, B, Case, S, answer_of_rank, draw, worst_errors

# sums of a few dozen products in another order
ROUNDING = 1e-13


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_find_what_the_whole_softmax_finds(world_size: int) -> None:
    for found in run_on_ranks(world_size, worst_errors, AllToAllAttention):
        assert set(found) == set(CASES)
        assert all(error < ROUNDING for error in found.values()), found


@pytest.mark.parametrize(("size", "copies"), [(2, 1), (4, 2)])
def test_a_rank_sends_heads_of_its_rows_and_each_group_to_those_that_need_it(size: int, copies: int) -> None:
    state, tallies = ParallelState.recorded(Grid(size, cp=size), 1)
    case = Case()
    answer_of_rank(AllToAllAttention(state.cp), case, draw(case, torch.float32), state)
    rows = S // size * B * GROUPS * WIDTH
    # queries and answers, keys and values, of this rank's rows, each way; what it keeps itself does not travel
    elements = 2 * (2 * rows * PER_GROUP + 2 * rows * copies)
    assert tallies["cp"].sent_bytes == {"all_to_all": 4 * elements * (size - 1) // size}
    assert tallies["cp"].calls == {"all_to_all": 6}
