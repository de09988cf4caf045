"""A softmax in blocks is the softmax of all scores, whatever the order, and nothing is seen where nothing may be."""

import math

import pytest
import torch
from torch import Tensor

from megatron_moe.layers.blockwise_softmax import Answer, RunningSoftmax, block_gradients

N, R, D, BLOCKS = 2, 3, 4, (5, 1, 7)
WIDE = torch.float64


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=WIDE)


def mixed_in_blocks(queries: Tensor, scores: Tensor, values: Tensor, order: list[int]) -> RunningSoftmax:
    found = RunningSoftmax(queries, WIDE)
    pieces = list(zip(scores.split(BLOCKS, dim=2), values.split(BLOCKS, dim=1), strict=True))
    for number in order:
        found.add(pieces[number][0].clone(), pieces[number][1])
    return found


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_blocks_in_any_order_give_the_softmax_of_all(order: list[int], size: float) -> None:
    torch.manual_seed(0)
    scores, values = size * draw(N, R, sum(BLOCKS)), draw(N, sum(BLOCKS), D)
    scores[0, 0, :6] = -math.inf  # the first two blocks, and nothing else
    scores[0, 1, 6:] = -math.inf
    found = mixed_in_blocks(draw(N, R, D), scores, values, order)
    torch.testing.assert_close(found.mixed(), scores.softmax(dim=-1) @ values)
    torch.testing.assert_close(found.log_sum(), scores.logsumexp(dim=-1))


def test_a_query_that_sees_nothing_gets_zero_and_gives_no_gradient() -> None:
    torch.manual_seed(1)
    queries, keys, values = draw(N, R, D), draw(N, sum(BLOCKS), D), draw(N, sum(BLOCKS), D)
    scores = queries @ keys.transpose(1, 2)
    scores[1, 2] = -math.inf
    found = mixed_in_blocks(queries, scores, values, [0, 1, 2])
    assert torch.equal(found.mixed()[1, 2], torch.zeros(D, dtype=WIDE))
    assert found.log_sum()[1, 2] == math.inf
    gradient = draw(N, R, D)
    answer = Answer(gradient, (gradient * found.mixed()).sum(dim=-1), found.log_sum())
    parts = block_gradients(scores, answer, queries, keys, values)
    assert torch.equal(parts.query[1, 2], torch.zeros(D, dtype=WIDE))
    assert torch.equal(parts.scores[1, 2], torch.zeros(sum(BLOCKS), dtype=WIDE))
    assert parts.key.isfinite().all() and parts.value.isfinite().all()


def test_gradients_of_blocks_are_those_of_the_softmax() -> None:
    torch.manual_seed(2)
    inputs = [draw(N, R, D), draw(N, sum(BLOCKS), D), draw(N, sum(BLOCKS), D)]
    queries, keys, values = (tensor.requires_grad_() for tensor in inputs)
    scores = queries @ keys.transpose(1, 2)
    scores.retain_grad()
    out, gradient = scores.softmax(dim=-1) @ values, draw(N, R, D)
    (out * gradient).sum().backward()
    with torch.no_grad():
        answer = Answer(gradient, (gradient * out).sum(dim=-1), scores.logsumexp(dim=-1))
        pieces = zip(*(tensor.split(BLOCKS, dim=1) for tensor in (keys, values)), strict=True)
        found = [block_gradients(queries @ key.transpose(1, 2), answer, queries, key, value) for key, value in pieces]
    torch.testing.assert_close(sum(part.query for part in found), queries.grad)
    torch.testing.assert_close(torch.cat([part.key for part in found], dim=1), keys.grad)
    torch.testing.assert_close(torch.cat([part.value for part in found], dim=1), values.grad)
    torch.testing.assert_close(torch.cat([part.scores for part in found], dim=2), scores.grad)
