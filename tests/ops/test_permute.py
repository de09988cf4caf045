"""Tokens into rows and weighted answers home again, against loops; some tokens have no row, some have many."""

import pytest
import torch
from torch import Tensor

from megatron_moe.ops.permute import combine, copies_of, permute

T, H, K = 5, 3, 2
# each row's token: all assignments of two choices; one of token 1 and of token 4 dropped; token 3 with no row and
# token 2 with three; none at all
ROWS = [[2, 4, 0, 3, 0, 4, 1, 1, 3, 2], [3, 0, 2, 4, 0, 1, 3, 2], [4, 2, 0, 2, 0, 1, 2], []]


def ids(rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rows", ROWS)
def test_a_tokens_rows_are_listed_in_order(rows: list[int]) -> None:
    copies = copies_of(ids(rows), T)
    ends = [*copies.starts.tolist()[1:], len(rows)]
    for token, (start, end) in enumerate(zip(copies.starts.tolist(), ends, strict=True)):
        assert copies.by_token[start:end].tolist() == [row for row, of in enumerate(rows) if of == token]


@pytest.mark.parametrize("rows", ROWS)
def test_permute_brings_each_rows_token_and_adds_up_its_gradients(rows: list[int]) -> None:
    tokens, upward = values(T, H), values(len(rows), H).detach()
    found = permute(tokens, copies_of(ids(rows), T))
    assert found.shape == (len(rows), H)
    wanted = torch.zeros(T, H, dtype=torch.float64)
    for row, token in enumerate(rows):
        assert torch.equal(found[row], tokens[token])
        wanted[token] += upward[row]
    found.backward(upward)
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad, wanted)


@pytest.mark.parametrize("rows", ROWS)
def test_combine_sums_each_tokens_weighted_answers(rows: list[int]) -> None:
    answers, weights = values(len(rows), H), values(len(rows))
    wanted = torch.zeros(T, H, dtype=torch.float64)
    for row, token in enumerate(rows):
        wanted[token] += weights.detach()[row] * answers.detach()[row]
    torch.testing.assert_close(combine(answers, weights, copies_of(ids(rows), T)).detach(), wanted)


@pytest.mark.parametrize("rows", ROWS[:3])
def test_gradients_equal_differences(rows: list[int]) -> None:
    copies = copies_of(ids(rows), T)
    assert torch.autograd.gradcheck(lambda tokens: permute(tokens, copies), values(T, H))
    assert torch.autograd.gradcheck(lambda a, b: combine(a, b, copies), (values(len(rows), H), values(len(rows))))


def test_weights_without_gradient_get_none() -> None:
    answers, weights = values(len(ROWS[0]), H), values(len(ROWS[0])).detach()
    assert torch.autograd.gradcheck(lambda a: combine(a, weights, copies_of(ids(ROWS[0]), T)), (answers,))
    assert weights.grad is None


@pytest.mark.parametrize("num_tokens", [T, 0])
def test_when_there_is_no_row_answers_and_gradients_are_zero(num_tokens: int) -> None:
    tokens, weights = values(num_tokens, H), values(0)
    copies = copies_of(ids([]), num_tokens)
    out = combine(permute(tokens, copies), weights, copies)
    assert out.shape == (num_tokens, H) and not out.any()
    out.sum().backward()
    assert tokens.grad is not None and tokens.grad.shape == (num_tokens, H) and not tokens.grad.any()
    assert weights.grad is not None and weights.grad.shape == (0,)


def test_a_bad_number_stays_with_its_token() -> None:
    answers = torch.ones(7, H)
    answers[0] = float("inf")  # of token 4
    out = combine(answers, torch.ones(7), copies_of(ids(ROWS[2]), T))
    assert out.isfinite().all(dim=1).tolist() == [True, True, True, True, False]


def test_there_and_home_with_equal_weights_gives_the_tokens_back() -> None:
    tokens, copies = values(T, H), copies_of(ids(ROWS[0]), T)
    weights = torch.full((T * K,), 1 / K, dtype=torch.float64)
    torch.testing.assert_close(combine(permute(tokens, copies), weights, copies), tokens)


def test_answers_are_summed_as_wide_as_their_weights() -> None:
    answers = torch.tensor([[1e8], [1.0], [-1e8]])  # float32 loses the 1
    found = combine(answers, torch.ones(3, dtype=torch.float64), copies_of(ids([0, 0, 0]), 1))
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.0]]


def test_weights_of_bfloat16_answers_are_not_rounded() -> None:
    answers = torch.tensor([[256.0], [-256.0]], dtype=torch.bfloat16)
    weights = torch.tensor([1 + 2**-12, 1.0], requires_grad=True)  # bfloat16 has 8 bits
    found = combine(answers, weights, copies_of(ids([0, 0]), 1))
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[2**-4]]
    found.backward(torch.ones_like(found))
    assert weights.grad is not None and weights.grad.tolist() == [256.0, -256.0]


@pytest.mark.parametrize(("ones", "total"), [(8, 264.0), (1, 256.0), (3, 260.0)])
@pytest.mark.parametrize("width", [1, 40])
def test_bfloat16_gradients_are_summed_wide_and_ties_rounded_to_even(ones: int, total: float, width: int) -> None:
    tokens = torch.zeros(1, width, dtype=torch.bfloat16, requires_grad=True)
    upward = torch.ones(1 + ones, width, dtype=torch.bfloat16)
    upward[0] = 256  # the next bfloat16 are 258 and 260: added one by one the ones would be lost
    permute(tokens, copies_of(ids([0] * (1 + ones)), 1)).backward(upward)
    assert tokens.grad is not None and tokens.grad.tolist() == [[total] * width]


def test_shapes_are_found_without_values() -> None:
    copies = copies_of(torch.zeros(7, dtype=torch.int64, device="meta"), T)
    tokens = torch.zeros(T, H, device="meta", requires_grad=True)
    out = combine(permute(tokens, copies), torch.zeros(7, device="meta", requires_grad=True), copies)
    out.sum().backward()
    assert out.shape == (T, H)
    assert tokens.grad is not None and tokens.grad.shape == (T, H)
