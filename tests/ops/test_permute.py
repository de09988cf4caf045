"""Rows into expert order and home again, against loops; with assignments that went to nobody."""

import pytest
import torch
from torch import Tensor

from megatron_moe.ops.permute import combine, invert, permute, unpermute

T, H, K = 5, 3, 2
TOKEN_IDS = torch.arange(T).repeat_interleave(K)
# assignments 0..9 in expert order; 3 and 8 were dropped
ORDERS = [
    torch.tensor([7, 0, 5, 9, 1, 2, 6, 4]),
    torch.tensor([4, 9, 0, 6, 1, 8, 3, 2, 7, 5]),
    torch.tensor([], dtype=torch.int64),
]
ANYHOW = torch.tensor([4, 0, 0, 2, 2, 2, 1])  # token 3 has no assignment, token 2 has three


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("order", ORDERS)
def test_invert_says_where_each_stands(order: Tensor) -> None:
    found = invert(order, 10).tolist()
    listed = order.tolist()
    assert found == [listed.index(item) if item in listed else len(listed) for item in range(10)]


@pytest.mark.parametrize("order", ORDERS)
def test_permute_brings_each_assignments_token(order: Tensor) -> None:
    tokens = values(T, H)
    found = permute(tokens, TOKEN_IDS, order, K)
    assert found.shape == (len(order), H)
    for row, assignment in enumerate(order.tolist()):
        assert torch.equal(found[row], tokens[assignment // K])


@pytest.mark.parametrize("order", ORDERS)
def test_unpermute_brings_rows_home_and_zeros_where_none_came(order: Tensor) -> None:
    rows = values(len(order), H)
    home = unpermute(rows, order, 10)
    listed = order.tolist()
    for assignment in range(10):
        wanted = rows[listed.index(assignment)] if assignment in listed else torch.zeros(H, dtype=rows.dtype)
        assert torch.equal(home[assignment], wanted)


@pytest.mark.parametrize(("token_ids", "choices"), [(TOKEN_IDS, K), (TOKEN_IDS, 0), (ANYHOW, 0)])
def test_combine_sums_each_tokens_weighted_answers(token_ids: Tensor, choices: int) -> None:
    home, weights = values(len(token_ids), H), values(len(token_ids))
    wanted = torch.zeros(T, H, dtype=torch.float64)
    for assignment, token in enumerate(token_ids.tolist()):
        wanted[token] += weights.detach()[assignment] * home.detach()[assignment]
    torch.testing.assert_close(combine(home, weights, token_ids, T, choices).detach(), wanted)
    assert torch.autograd.gradcheck(lambda a, b: combine(a, b, token_ids, T, choices), (home, weights))


@pytest.mark.parametrize("order", ORDERS[:2])
@pytest.mark.parametrize("choices", [K, 0])
def test_gradient_of_the_way_there(order: Tensor, choices: int) -> None:
    assert torch.autograd.gradcheck(lambda tokens: permute(tokens, TOKEN_IDS, order, choices), values(T, H))


def test_gradient_of_the_way_there_when_assignments_stand_anyhow() -> None:
    order = torch.tensor([6, 2, 0, 4, 1])
    assert torch.autograd.gradcheck(lambda tokens: permute(tokens, ANYHOW, order, 0), values(T, H))


@pytest.mark.parametrize("order", ORDERS[:2])
def test_gradient_of_the_way_home(order: Tensor) -> None:
    assert torch.autograd.gradcheck(lambda rows: unpermute(rows, order, 10), values(len(order), H))


@pytest.mark.parametrize("choices", [K, 0])
def test_when_everything_was_dropped_the_gradient_is_zero(choices: int) -> None:
    tokens = values(T, H)
    rows = permute(tokens, TOKEN_IDS, ORDERS[2], choices)
    home = unpermute(rows, ORDERS[2], 10)
    combine(home, torch.ones(10, dtype=torch.float64), TOKEN_IDS, T, choices).sum().backward()
    assert tokens.grad is not None and not tokens.grad.any()


def test_no_tokens_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    tokens = torch.zeros(0, H, requires_grad=True)
    home = unpermute(permute(tokens, none, none, K), none, 0)
    combine(home, torch.zeros(0), none, 0, K).sum().backward()
    assert tokens.grad is not None and tokens.grad.shape == (0, H)


def test_there_and_home_with_equal_weights_gives_the_tokens_back() -> None:
    tokens = values(T, H)
    rows = permute(tokens, TOKEN_IDS, ORDERS[1], K)
    home = unpermute(rows, ORDERS[1], 10)
    weights = torch.full((10,), 1 / K, dtype=torch.float64)
    torch.testing.assert_close(combine(home, weights, TOKEN_IDS, T, K), tokens)


def test_answers_are_summed_as_wide_as_their_weights() -> None:
    home = torch.tensor([[1e8], [1.0], [-1e8]])  # float32 loses the 1
    found = combine(home, torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), 1, 3)
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.0]]
