"""The best of cells on several ranks are the best of all, ties included."""

import pytest
import torch
from layer_checks import ALONE
from moe_rows import tp_state
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.moe.unrouted.cell_choice import best_cells, gather_tokens, largest
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState

CELLS = 12
COUNTS = (1, 2, 5, 11, 12)


def table() -> Tensor:
    """(40, 12): few different scores, so that most are shared; one row of equals, one with numbers that are none."""
    scores = torch.randint(0, 4, (40, CELLS), generator=torch.Generator().manual_seed(3)).double()
    scores[0] = 1.0
    scores[1, ::2] = torch.nan
    scores[2, 3] = torch.inf
    scores[3, 4:] = -torch.inf
    return scores


def by_sorting(scores: Tensor, count: int) -> list[list[int]]:
    """Cells by falling score, then by number; nan is less than all."""
    found = []
    for row in scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).tolist():
        found.append(sorted(sorted(range(len(row)), key=lambda cell: (-row[cell], cell))[:count]))
    return found


def cells_of(chosen: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in chosen]


@pytest.mark.parametrize("count", COUNTS)
def test_of_equal_scores_the_lowest_cells_are_chosen(count: int) -> None:
    assert cells_of(best_cells(table(), count, ALONE.ep)) == by_sorting(table(), count)


def chosen_on_rank(rank: int, world_size: int) -> list[list[list[int]]]:
    ep = ParallelState.distributed(Grid(world_size, ep=world_size)).ep
    mine = table().chunk(world_size, dim=1)[rank]
    return [best_cells(mine, count, ep).int().tolist() for count in COUNTS]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_choose_together_what_one_chooses_alone(world_size: int) -> None:
    answers = run_on_ranks(world_size, chosen_on_rank)
    for number, count in enumerate(COUNTS):
        whole = torch.cat([torch.tensor(answer[number]) for answer in answers], dim=1) > 0
        assert cells_of(whole) == by_sorting(table(), count)


def test_no_row_has_no_choice() -> None:
    assert best_cells(torch.zeros(0, 5), 2, ALONE.ep).shape == (0, 5)


def gathered_on_rank(rank: int, world_size: int) -> tuple[list[int], list[list[float]], list[bool], list[list[float]]]:
    ep = tp_state(rank, world_size).tp
    rows = torch.full((rank, 2), float(rank)).requires_grad_()
    found = gather_tokens(rows, torch.arange(rank) % 2 == 1, ep)
    # each rank goes on with the tokens in a way of its own
    (found.rows * (10.0**rank)).sum().backward()
    assert rows.grad is not None
    return found.counts, found.rows.tolist(), found.is_padding.tolist(), rows.grad.tolist()


def test_every_rank_gets_all_tokens_and_gradients_come_home() -> None:
    for rank, (counts, rows, padding, gradient) in enumerate(run_on_ranks(3, gathered_on_rank)):
        assert counts == [0, 1, 2]
        assert rows == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
        assert padding == [False, False, True]
        assert gradient == [[111.0, 111.0]] * rank


def test_largest_counts_equals_from_the_left() -> None:
    assert largest(torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]]), 2).tolist() == [[1, 2]]
