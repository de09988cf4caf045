"""The balanced assignment: the best total of scipy's solver, exact loads, and what does not depend on company."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from megatron_moe.moe.routers.assignment import _begin, _Flow, _next_round, _whole_numbers, balanced_assignment

# T tokens, E experts: divisible or not, fewer tokens than experts, one of each
SIZES = [(6, 3), (7, 3), (50, 7), (128, 16), (3, 5), (64, 64), (1, 1), (1, 4), (20, 1), (90, 11)]


def draw(kind: str, tokens: int, experts: int) -> np.ndarray:
    rng = np.random.default_rng(tokens * 100 + experts)
    scores = rng.standard_normal((tokens, experts))
    if kind == "ties":
        return rng.integers(0, 3, (tokens, experts)).astype(float)
    if kind == "all equal":
        return np.ones((tokens, experts))
    if kind == "one expert dominates":
        scores[:, 0] += 10.0
    if kind == "eight kinds of tokens":
        scores = scores[rng.integers(0, 8, tokens) % tokens] + 1e-3 * rng.standard_normal((tokens, experts))
    if kind == "one direction":
        scores = rng.standard_normal((tokens, 1)) @ rng.standard_normal((1, experts))
    if kind == "experts differ, tokens hardly":
        scores = rng.standard_normal((1, experts)) + 1e-6 * scores
    return scores


KINDS = [
    "normal",
    "ties",
    "all equal",
    "one expert dominates",
    "eight kinds of tokens",
    "one direction",
    "experts differ, tokens hardly",
]


def best_total(scores: np.ndarray) -> float:
    """By scipy: T // E places of each expert have to be filled; one more of each may stay empty at no cost."""
    tokens, experts = scores.shape
    floor, rest = divmod(tokens, experts)
    columns = np.repeat(np.arange(experts), floor)
    if rest:
        columns = np.concatenate([columns, np.arange(experts)])
    table = scores[:, columns]
    if rest:
        blanks = np.zeros((experts - rest, len(columns)))
        blanks[:, : floor * experts] = -1e6  # a blank may not take one of the places that have to be filled
        table = np.concatenate([table, blanks])
    rows, places = linear_sum_assignment(table, maximize=True)
    return float(table[rows, places].sum())


def assigned(scores: np.ndarray, **limits: int) -> np.ndarray:
    table = torch.tensor(scores)[None]
    found: np.ndarray = balanced_assignment(table, torch.ones(1, len(scores), dtype=torch.bool), **limits)[0].numpy()
    return found


def check_loads(experts_of: np.ndarray, experts: int) -> None:
    loads = np.bincount(experts_of, minlength=experts)
    assert len(loads) == experts
    assert loads.max() - loads.min() <= 1
    assert loads.sum() == len(experts_of)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "experts"), SIZES)
def test_the_total_is_the_best_one(tokens: int, experts: int, kind: str) -> None:
    scores = draw(kind, tokens, experts)
    found = assigned(scores)
    check_loads(found, experts)
    # scores count in steps of 2^-40 of their spread
    error = abs(scores[np.arange(tokens), found].sum() - best_total(scores))
    assert error <= tokens * 2.0**-40 * np.ptp(scores) + 1e-12 * np.abs(scores).sum()


@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "experts"), SIZES)
def test_a_solver_that_is_stopped_early_still_balances(tokens: int, experts: int, kind: str, rounds: int) -> None:
    check_loads(assigned(draw(kind, tokens, experts), max_rounds=rounds), experts)


def test_stopping_early_costs_score() -> None:
    # otherwise the test above would not meet the places that are filled in the end
    scores = draw("eight kinds of tokens", 128, 16)
    early = assigned(scores, max_rounds=1)
    assert scores[np.arange(128), early].sum() < best_total(scores) - 1e-6


def test_the_worked_assignment() -> None:
    scores = np.array([[2, 1, 0], [1.5, 0.5, 0.4], [3, 0.2, -1], [0, 2, 1], [1, 0.9, 0], [0.2, 0.1, 0.4]])
    found = assigned(scores)
    assert found.tolist() == [0, 2, 0, 1, 1, 2]
    assert scores[np.arange(6), found].sum() == pytest.approx(8.7)


@pytest.mark.parametrize(("kind", "rounds"), [("ties", 60), ("all equal", 60), ("eight kinds of tokens", 45)])
def test_hard_problems_are_solved_in_few_rounds(kind: str, rounds: int) -> None:
    # measured 34, 31 and 22, where hundreds of tokens are too many at first
    scores = draw(kind, 512, 32)
    found = assigned(scores, max_rounds=rounds)
    assert scores[np.arange(512), found].sum() == pytest.approx(best_total(scores), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_round_brings_tokens_home_and_takes_none_too_many(kind: str) -> None:
    scores, is_token = torch.tensor(draw(kind, 90, 11))[None], torch.ones(1, 90, dtype=torch.bool)
    flow = _begin(_whole_numbers(scores, is_token), is_token, is_token.sum(dim=1))
    while (flow.load > flow.places).any():
        before, flow = flow.load - flow.places, _next_round(flow)
        after = flow.load - flow.places
        assert after.clamp(min=0).sum() < before.clamp(min=0).sum()
        # who had too many gives no more than that, who had too few gets no more, and the others keep theirs
        assert (after.abs() <= before.abs()).all()
        assert (after * before >= 0).all()


def test_a_row_that_two_paths_want_goes_one_way_only() -> None:
    # A can go from column 0 to 1 or 3, B to 3 only, C from 1 to 2: the paths 0, 1, 2 and 0, 3 both begin with A
    scores = torch.tensor([[0.0, 0, -5, 0], [0, -5, -5, 0], [-5, 0, 0, -5]], dtype=torch.float64)[None]
    places, column = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1]])
    exists = torch.ones(1, 3, dtype=torch.bool)
    first = _next_round(_Flow(scores, exists, places, torch.zeros(1, 4, dtype=torch.float64), column))
    assert first.column.tolist() == [[1, 0, 2]]
    assert _next_round(first).column.tolist() == [[1, 3, 2]]


def test_shuffled_tokens_keep_their_experts() -> None:
    scores = draw("normal", 60, 7)
    order = np.random.default_rng(0).permutation(60)
    assert (assigned(scores[order]) == assigned(scores)[order]).all()


def test_a_group_does_not_depend_on_the_groups_beside_it() -> None:
    kinds = ["ties", "all equal", "normal", "one expert dominates"]
    together = torch.stack([torch.tensor(draw(kind, 50, 7)) for kind in kinds])
    found = balanced_assignment(together, torch.ones(4, 50, dtype=torch.bool))
    for kind, mine in zip(kinds, found, strict=True):
        assert mine.tolist() == assigned(draw(kind, 50, 7)).tolist(), kind


@pytest.mark.parametrize("rounds", [0, 1000])
def test_padding_takes_no_place(rounds: int) -> None:
    scores = draw("one expert dominates", 40, 6)
    is_token = torch.arange(40) % 3 > 0
    # whatever stands in the lines of padding
    table = torch.tensor(scores).masked_fill(~is_token[:, None], float("inf"))
    both = torch.stack([table, table])
    none = torch.stack([is_token, torch.zeros_like(is_token)])
    found = balanced_assignment(both, none, max_rounds=rounds)
    assert found[0][~is_token].tolist() == [6] * int((~is_token).sum())
    assert found[1].tolist() == [6] * 40
    assert found[0][is_token].tolist() == assigned(scores[is_token.numpy()], max_rounds=rounds).tolist()


def test_scores_that_are_none_count_as_the_smallest() -> None:
    scores = draw("normal", 30, 4)
    mended = scores.copy()
    scores[3, 1], scores[7, 0], scores[11, 2] = np.nan, np.inf, -np.inf
    finite = scores[np.isfinite(scores)].min()
    mended[3, 1] = mended[7, 0] = mended[11, 2] = finite
    assert assigned(scores).tolist() == assigned(mended).tolist()
    check_loads(assigned(np.full((9, 4), np.nan)), 4)


def test_no_tokens_need_no_experts() -> None:
    empty: Tensor = balanced_assignment(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.bool))
    assert empty.shape == (2, 0)
