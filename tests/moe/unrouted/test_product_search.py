"""The product search finds exactly what a search over all n² cells finds."""

import itertools

import pytest
import torch

from megatron_moe.moe.unrouted.product_search import best_sums


def by_trying_all(halves: torch.Tensor, count: int) -> list[list[list[int]]]:
    """Cells by falling sum, as rounded; then by falling first half and its number, then second; in rising order."""
    sums = (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).tolist()
    found = []
    for token, token_sums in zip(halves.tolist(), sums, strict=True):
        heads = []
        for (first, second), table in zip(token, token_sums, strict=True):
            pairs = itertools.product(range(len(first)), range(len(second)))
            ranked = sorted((-table[i][j], -first[i], i, -second[j], j) for i, j in pairs)
            heads.append(sorted(i * len(second) + j for _, _, i, _, j in ranked[:count]))
        found.append(heads)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9, 30, 81])
def test_it_equals_a_search_over_all_cells(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    halves = torch.randn(11, 2, 2, 9, generator=generator, dtype=torch.float64)
    cells, scores = best_sums(halves, count)
    assert cells.sort(dim=2).values.tolist() == by_trying_all(halves, count)
    sums = (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).flatten(2)
    torch.testing.assert_close(scores, sums.gather(2, cells))


@pytest.mark.parametrize("count", [1, 2, 4, 9, 16, 25])
def test_of_equal_sums_those_with_the_better_first_half_are_found(count: int) -> None:
    # small whole numbers: sums are exact, and most are shared
    halves = torch.randint(0, 3, (60, 1, 2, 5), generator=torch.Generator().manual_seed(1)).double()
    assert best_sums(halves, count)[0].sort(dim=2).values.tolist() == by_trying_all(halves, count)


def test_the_gradient_of_a_score_reaches_its_two_halves() -> None:
    halves = torch.tensor([[[[3.0, 1.0, 0.0], [0.0, 5.0, 4.5]]]]).requires_grad_()
    cells, scores = best_sums(halves, 3)
    assert cells.tolist() == [[[1, 2, 4]]]
    (scores * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert halves.grad is not None
    assert halves.grad.tolist() == [[[[11.0, 100.0, 0.0], [0.0, 101.0, 10.0]]]]


def test_rounding_that_makes_sums_equal_upsets_nothing() -> None:
    # in float32 each of these sums is 2^24: more than seven are equal only by rounding
    first = 2.0**24 + torch.tensor([0.0, 0.0, 0.0])
    second = torch.tensor([0.5, 0.25, 0.75])
    halves = torch.stack([first, second])[None, None]
    for count in range(1, 10):
        assert best_sums(halves, count)[0].sort(dim=2).values.tolist() == by_trying_all(halves, count)
