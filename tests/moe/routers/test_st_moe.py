"""ST-MoE top-n: worked numbers and each threshold policy."""

import math
from dataclasses import replace

import pytest
import torch
from moe_rows import golden_router, make_router, token_info, weights_of
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.plan import RoutingPlan, TokenInfo

WORKED = [0.80, 0.12, 0.05, 0.03]  # one token's scores
SHARES = [0.8247, 0.1237, 0.0515]


def st_moe(choices: int = 3, **options: str) -> MoEConfig:
    return MoEConfig(
        num_experts=4,
        router_type="st_moe",
        router_topk=choices,
        aux_loss_coeff=0.01,
        z_loss_coeff=0.001,
        router_options=options,
    )


def route(config: MoEConfig, logits: list[list[float]], info: TokenInfo) -> RoutingPlan:
    router = make_router(config, 4)
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(4))
    plan: RoutingPlan = router(torch.tensor(logits, dtype=torch.float64), info)
    return plan


def used(config: MoEConfig, *, train: bool = True, repeats: int = 1) -> Tensor:
    """How often each of the worked token's three experts is used."""
    logits = [[math.log(score) for score in WORKED]] * repeats
    plan = route(config, logits, token_info(repeats, train=train))
    return (plan.expert_ids.view(repeats, 3) < 4).double().mean(dim=0)


def test_weights_are_renormalised_over_the_n_best_whoever_is_passed_over() -> None:
    for policy in ("all", "none", "random", "threshold"):
        plan = route(st_moe(train_policy=policy), [[math.log(score) for score in WORKED]], token_info(1))
        assert plan.combine_weights.tolist() == pytest.approx(SHARES, abs=1e-4)


@pytest.mark.parametrize(("threshold", "expected"), [("0.2", [1, 0.6186, 0.2577]), ("0.05", [1, 1, 1])])
def test_further_experts_are_used_as_often_as_their_weight_is_of_the_threshold(
    threshold: str, expected: list[float]
) -> None:
    assert used(st_moe(train_threshold=threshold), repeats=8000).tolist() == pytest.approx(expected, abs=0.02)
    evaluated = used(st_moe(eval_policy="random", eval_threshold=threshold), train=False, repeats=8000)
    assert evaluated.tolist() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("policy", "threshold", "expected"),
    [
        ("all", "0.2", [1, 1, 1]),
        ("none", "0.2", [1, 0, 0]),
        ("threshold", "0.2", [1, 0, 0]),
        ("threshold", "0.1", [1, 1, 0]),
        ("random", "0", [1, 1, 1]),
    ],
)
def test_the_sure_policies_hold_in_training_and_evaluation_separately(
    policy: str, threshold: str, expected: list[float]
) -> None:
    training = st_moe(train_policy=policy, train_threshold=threshold, eval_policy="all")
    assert used(training).tolist() == expected
    assert used(training, train=False).tolist() == [1, 1, 1]
    evaluation = st_moe(eval_policy=policy, eval_threshold=threshold, train_policy="all")
    assert used(evaluation, train=False).tolist() == expected
    assert used(evaluation).tolist() == [1, 1, 1]


def test_the_golden_second_experts_have_their_chance() -> None:
    router, tokens = golden_router(st_moe(2))
    repeats = 4000
    plan = router(tokens.repeat_interleave(repeats, dim=0), token_info(6, repeats))
    chance = (plan.expert_ids.view(6, repeats, 2)[..., 1] < 4).double().mean(dim=1)
    assert chance.tolist() == pytest.approx([1, 1, 0.2866, 1, 1, 1], abs=0.03)
    # every token is there as often as any other, so the losses per group of one sample are the golden ones
    assert plan.aux_losses["load_balance_loss"].share.item() / repeats == pytest.approx(1.5002, abs=1e-4)
    assert plan.aux_losses["load_balance_loss"].weight == 0.01
    assert plan.aux_losses["z_loss"].share.item() / (6 * repeats) == pytest.approx(5.4931, abs=1e-4)
    assert (plan.aux_losses["z_loss"].weight, plan.aux_losses["z_loss"].per) == (0.001, "token")


def test_a_threshold_of_zero_is_plain_top_n() -> None:
    router, tokens = golden_router(st_moe(train_threshold="0"))
    plain, _ = golden_router(MoEConfig(num_experts=4, router_topk=3))
    info = token_info(6)
    assert weights_of(router(tokens, info)) == weights_of(plain(tokens, info))


def test_each_further_expert_has_a_draw_of_its_own_keyed_by_the_token() -> None:
    # equal weights of 1/3 against a threshold of 1: independent coins for experts 2 and 3
    config = st_moe(train_threshold="1")
    info = token_info(8000)
    router = make_router(config, 4)
    with torch.no_grad():
        router.get_parameter("weight").zero_()
    plan = router(torch.ones(8000, 4, dtype=torch.float64), info)
    coins = (plan.expert_ids.view(8000, 3)[:, 1:] < 4).double()
    assert coins.mean(dim=0).tolist() == pytest.approx([1 / 3] * 2, abs=0.02)
    assert coins.prod(dim=1).mean().item() == pytest.approx(1 / 9, abs=0.02)
    draws = info.random.at(stream="further_experts").uniform_rows(info.global_keys, 2)
    assert torch.equal(coins.bool(), draws < 1 / 3)
    later = router(torch.ones(8000, 4, dtype=torch.float64), replace(info, random=info.random.at(step=1)))
    assert not torch.equal(later.expert_ids, plan.expert_ids)
