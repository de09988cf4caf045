"""The low-rank controller: its choice, its noise, and the gradient that it is trained with."""

from typing import Any

import pytest
import torch
from layer_checks import ask, draw
from moe.unrouted.memories import fill, make_memory, plain
from moe_rows import token_info
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.moe.unrouted import controller
from megatron_moe.moe.unrouted.memory import MemoryLayer

QUIET: dict[str, Any] = {
    "router_type": "controller",
    "activation": "gelu",
    "router_topk": 1,
    "router_options": {"rank": "3", "gumbel_noise": "false", "temperature": "0.5"},
}


def noisy(**options: str) -> dict[str, Any]:
    return {**QUIET, "router_options": {"rank": "3", **options}}


def test_worked_example() -> None:
    # four cells in two blocks of two, one number a token: controller scores (1, 2, 2, 2) x
    fields = {**QUIET, "activation": "relu", "ffn_hidden_size": 1, "router_topk": 2}
    with pytest.raises(ConfigError, match="must be a whole number and divide the 1 cells of an expert"):
        make_memory(fields, hidden=1)
    fields = {**fields, "ffn_hidden_size": 2, "router_options": {"rank": "1", "gumbel_noise": "false"}}
    layer = make_memory(fields, hidden=1)
    fill(layer, down=[[1.0]], control=[1, 2, 2, 2, 0, 0, 3, 1], keys=range(1, 9), values=[10**p for p in range(8)])
    # x = 1: cells 1, 2 (of equals the lower), 4, 6 answer with their key times their value
    assert ask(layer, torch.ones(1, 1, dtype=torch.float64), train=False).answers.item() == 7_050_320
    # x = -1: the smallest scores are the best now, but relu is 0 everywhere
    mixed = ask(layer, -torch.ones(1, 1, dtype=torch.float64))
    assert mixed.answers.item() == 0
    assert mixed.report.stats["tokens_per_expert"].tolist() == [1, 1, 1, 1]
    fill(layer, keys=[-key for key in range(1, 9)])
    assert ask(layer, -torch.ones(1, 1, dtype=torch.float64)).answers.item() == 80_050_301


def choose(layer: MemoryLayer, tokens: Tensor) -> list[list[int]]:
    """The best cell of each block without noise."""
    scores = tokens @ layer.get_parameter("down").t() @ layer.get_parameter("control").t()
    blocks = scores.detach().view(len(tokens), -1, 4).tolist()
    return [[4 * number + block.index(max(block)) for number, block in enumerate(row)] for row in blocks]


@pytest.mark.parametrize("train", [False, True])
def test_one_cell_of_each_block_answers(train: bool) -> None:
    layer, tokens = make_memory(QUIET), draw(6)
    keys, values = layer.get_parameter("keys").detach(), layer.get_parameter("values").tolist()
    for answer, token, cells in zip(
        ask(layer, tokens, train=train).answers.tolist(), tokens, choose(layer, tokens), strict=True
    ):
        inner = [plain("gelu", float(token @ keys[cell])) for cell in cells]
        wanted = [sum(inner[n] * values[cell][column] for n, cell in enumerate(cells)) for column in range(6)]
        assert answer == pytest.approx(wanted)


def test_tokens_decoded_one_by_one_are_answered_as_together() -> None:
    # fewer tokens than a block has cells multiply with the chosen keys only
    layer, tokens = make_memory(noisy()), draw(6).requires_grad_()
    together = ask(layer, tokens, train=False).answers
    alone = torch.cat([ask(layer, row, train=False).answers for row in tokens.split([1, 2, 3])])
    torch.testing.assert_close(alone, together)
    leaves = [tokens, layer.get_parameter("keys"), layer.get_parameter("values")]
    weight = draw(6, 1)
    for one, other in zip(
        torch.autograd.grad((alone * weight).sum(), leaves),
        torch.autograd.grad((together * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_straight_through_gradient_is_the_formula() -> None:
    layer, tokens = make_memory(QUIET), draw(5).requires_grad_()
    down, control, keys, values = (layer.get_parameter(name) for name in ("down", "control", "keys", "values"))
    weight = draw(5, 1)
    (ask(layer, tokens).answers * weight).sum().backward()
    # by hand: L = Σ m_j a_j, a_j = gelu(x K_j) (V_j · weight), dm/ds = softmax(s / t)'
    with torch.no_grad():
        scores = (tokens @ down.t() @ control.t()).view(5, 4, 4)
        reward = (torch.nn.functional.gelu(tokens @ keys.t()) * (weight @ values.t())).view(5, 4, 4)
        soft = (scores / 0.5).softmax(dim=2)
        slope = torch.zeros_like(scores)
        for i in range(4):
            for j in range(4):
                # d soft_i / d s_j = soft_i (1[i = j] - soft_j) / t
                slope[:, :, j] += reward[:, :, i] * soft[:, :, i] * (float(i == j) - soft[:, :, j]) / 0.5
        slope = slope.view(5, 16)
    torch.testing.assert_close(control.grad, slope.t() @ (tokens @ down.t()).detach())
    torch.testing.assert_close(down.grad, (slope @ control).t().detach() @ tokens.detach())
    # the rest is what it would be with the choice standing still, and the controller's part of the token's gradient
    still = tokens.detach().requires_grad_()
    mask = torch.zeros(5, 16, dtype=torch.float64).scatter(1, torch.tensor(choose(layer, tokens)), 1.0)
    answer = (torch.nn.functional.gelu(still @ keys.detach().t()) * mask) @ values.detach()
    (answer * weight).sum().backward()
    assert still.grad is not None
    torch.testing.assert_close(tokens.grad, still.grad + (slope @ control @ down).detach())
    assert values.grad is not None and not values.grad[mask.sum(dim=0) == 0].any()
    assert values.grad[mask.sum(dim=0) > 0].any(dim=1).all()


def test_evaluation_holds_the_choice_still() -> None:
    layer = make_memory(noisy())
    ask(layer, draw(4), train=False).answers.sum().backward()
    assert layer.get_parameter("control").grad is None and layer.get_parameter("down").grad is None
    assert layer.get_parameter("keys").grad is not None


def test_gumbel_noise_draws_a_cell_by_the_softmax_of_its_scores() -> None:
    layer = make_memory(noisy(), hidden=1)
    fill(layer, down=[0.0, 0.0, 1.0], control=torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(4)[:, None] * torch.ones(3))
    # what was drawn shows in the answer: cell j of the first block answers with j
    fill(layer, keys=torch.full((16, 1), 30.0), values=torch.tensor([[0.0], [1.0], [2.0], [3.0], *([[0.0]] * 12)]) / 30)
    tokens = torch.ones(20_000, 1, dtype=torch.float64)
    drawn = ask(layer, tokens, token_info(20_000)).answers.round().long().flatten()
    shares = drawn.bincount(minlength=4) / 20_000
    wanted = torch.tensor([0.0, 1.0, 2.0, -1.0]).softmax(dim=0)
    # three standard deviations of a share of 20,000 draws are 0.0106 at most
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.011)


def test_noise_of_a_token_does_not_depend_on_its_neighbours_or_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, tokens = make_memory(noisy()), draw(12)
    whole = ask(layer, tokens, token_info(6, 2)).answers
    monkeypatch.setattr(controller, "_CHUNK", 40)
    torch.testing.assert_close(ask(layer, tokens, token_info(6, 2)).answers, whole)
    torch.testing.assert_close(ask(layer, tokens[:4], token_info(2, 2)).answers, whole[:4])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_topk": 3}, r"16 cells with 12 active ones .* make blocks of 1\.33333"),
        (
            {"router_topk": 2, "router_options": {"active_cells": "2"}},
            r"blocks of 8, which must .* the 4 cells of an ex",
        ),
        ({"router_options": {"temperature": "0"}}, r"temperature=0: expected a number above 0"),
    ],
)
def test_blocks_that_do_not_come_out_even_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_memory({**QUIET, **fields})
