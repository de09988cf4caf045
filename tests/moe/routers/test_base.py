"""BASE: worked numbers, equal loads, the residual form, and the difference between training and evaluation."""

from dataclasses import replace

import pytest
import torch
from moe_rows import make_router, pairs, token_info, weights_of
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.routers.router import Router

SCORES = [[2, 1, 0], [1.5, 0.5, 0.4], [3, 0.2, -1], [0, 2, 1], [1, 0.9, 0], [0.2, 0.1, 0.4]]


def draw(tokens: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64)


def base(experts: int = 4, hidden: int = 5) -> Router:
    return make_router(MoEConfig(num_experts=experts, router_type="base"), hidden)


def test_the_worked_assignment_and_its_weights_come_out() -> None:
    router = base(3, 3)
    router.get_parameter("weight").data.copy_(torch.eye(3))
    tokens = torch.tensor(SCORES, dtype=torch.float64)
    plan = router(tokens, token_info(6))
    assert plan.expert_ids.tolist() == [0, 2, 0, 1, 1, 2]
    expected = [0.8808, 0.5987, 0.9526, 0.8808, 0.7109, 0.5987]
    assert plan.combine_weights.tolist() == pytest.approx(expected, abs=1e-4)
    greedy = router(tokens, token_info(6, train=False))
    assert greedy.expert_ids.tolist() == [0, 0, 0, 1, 0, 2]
    assert greedy.combine_weights.tolist() == pytest.approx(tokens.amax(dim=1).sigmoid().tolist())


def test_loads_of_every_group_are_equal_in_training() -> None:
    info = token_info(8, 5, group_samples=2, padding=[(7, 0), (6, 0), (7, 4)])
    router = base()
    tokens = draw(40, 5) + 2.0
    plan = router(tokens, info)
    assert plan.mask().sum(dim=1).tolist() == (~info.is_padding).long().tolist()
    for group, loads in ((0, {3, 4}), (1, {4}), (2, {1, 2})):
        members = plan.mask()[info.groups == group]
        assert set(members.sum(dim=0).tolist()) == loads
    assert (router(tokens, replace(info, train=False)).tokens_per_expert() > 12).any()


def test_evaluation_asks_nobody_else() -> None:
    router = base()
    info = token_info(9, train=False)
    tokens = draw(9, 5)
    alone = [router(row[None], token_info(1, train=False)).expert_ids.item() for row in tokens]
    assert router(tokens, info).expert_ids.tolist() == alone
    training = replace(info, train=True)
    alone = [router(row[None], token_info(1)).expert_ids.item() for row in tokens]
    assert router(tokens, training).expert_ids.tolist() != alone


def test_one_expert_is_the_sigmoid_mix() -> None:
    router = make_router(MoEConfig(num_experts=1, router_type="base", router_topk=1), 5)
    tokens = draw(6, 5)
    plan = router(tokens, token_info(6))
    gate = (tokens @ router.get_parameter("weight")[0]).sigmoid()
    assert weights_of(plan) == pytest.approx({(t, 0): gate[t].item() for t in range(6)})
    # a · (x + FFN(x)) + (1 - a) · x = x + a · FFN(x): what the plan's weight under the outer residual computes
    answer = tokens.sin()
    mixed = gate[:, None] * (tokens + answer) + (1 - gate[:, None]) * tokens
    torch.testing.assert_close(mixed, tokens + plan.combine_weights[:, None] * answer)


def test_only_the_expert_that_was_chosen_learns_from_a_token() -> None:
    router = base()
    tokens = draw(4, 5)
    plan = router(tokens, token_info(4))
    plan.combine_weights[2].backward()
    grad = router.get_parameter("weight").grad
    assert grad is not None
    assert grad.abs().sum(dim=1).nonzero().flatten().tolist() == [plan.expert_ids[2].item()]


def test_rows_begin_with_a_tenth_of_length_and_nearly_orthogonal() -> None:
    weight = base(8, 4096).get_parameter("weight").detach()
    products = weight @ weight.T * 100
    torch.testing.assert_close(products, torch.eye(8, dtype=torch.float64), atol=0.08, rtol=0.0)


def test_a_token_of_numbers_that_are_none_leaves_the_others_balanced() -> None:
    router = base()
    tokens = draw(8, 5)
    tokens[3] = float("nan")
    plan = router(tokens, token_info(8))
    assert plan.tokens_per_expert().tolist() == [2, 2, 2, 2]
    assert pairs(plan) == pairs(router(tokens, token_info(8)))
