"""DeepSeekMoE and V2: groups, raw weights, losses at three levels and drops over a group's places."""

from typing import Any

import pytest
import torch
from moe_rows import NOBODY, golden_router, make_router, pairs, token_info, weights_of
from torch import Tensor
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.capacity import make_limit
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.group_limited import ExpertGroups, limited_experts
from megatron_moe.moe.routers.router import Router, Site

GROUPS = {"num_groups": "4", "topk_groups": "2"}


def deepseek(experts: int = 8, choices: int = 3, *, fields: dict[str, Any] | None = None, **options: str) -> MoEConfig:
    return MoEConfig(
        num_experts=experts, router_topk=choices, router_type="deepseek", router_options=options, **(fields or {})
    )


def identity_router(config: MoEConfig) -> Router:
    """Its logits are its tokens."""
    router = make_router(config, config.num_experts)
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(config.num_experts))
    return router


def slow_choice(scores: list[float], choices: int, *, num: int, kept: int, best: int) -> list[int]:
    """The best experts of the groups with the largest sums of their `best` scores; ties to the first."""
    width = len(scores) // num
    sums = [sum(sorted(scores[g * width : (g + 1) * width])[-best:]) for g in range(num)]
    groups = sorted(range(num), key=lambda g: (-sums[g], g))[:kept]
    allowed = [e for e in range(len(scores)) if e // width in groups]
    return sorted(allowed, key=lambda e: (-scores[e], e))[:choices]


@pytest.mark.parametrize(
    ("experts", "num", "kept", "best", "choices"),
    [(8, 4, 2, 1, 3), (8, 4, 2, 2, 4), (12, 3, 1, 2, 4), (12, 6, 4, 1, 5), (6, 2, 2, 3, 4), (6, 6, 3, 1, 3)],
)
def test_the_choice_equals_the_loop_ties_included(experts: int, num: int, kept: int, best: int, choices: int) -> None:
    # quarters, so that sums are exact and many are equal
    scores = torch.randint(0, 5, (300, experts), generator=torch.Generator().manual_seed(3)).double() / 4
    found = limited_experts(scores, choices, ExpertGroups(num, experts // num, kept, best))
    for row, chosen in zip(scores.tolist(), found.tolist(), strict=True):
        assert chosen == slow_choice(row, choices, num=num, kept=kept, best=best)
        assert len({expert // (experts // num) for expert in chosen}) <= kept


def test_groups_are_ranked_by_their_best_expert() -> None:
    # group 0 has the largest score, group 2 the second; the sums of pairs would say 1 and 3
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0, 2.5, -9.0, 2.2, 2.2]], dtype=torch.float64)
    router = identity_router(deepseek(**GROUPS))
    plan = router(logits, token_info(1))
    assert plan.expert_ids.tolist() == [0, 4, 1]


def test_weights_are_raw_scores_times_the_scale() -> None:
    router, tokens = golden_router(deepseek(4, 2, route_scale="16"))
    plain, _ = golden_router(MoEConfig(num_experts=4, router_pre_softmax=True))
    info = token_info(6)
    expected = {pair: 16 * weight for pair, weight in weights_of(plain(tokens, info)).items()}
    assert weights_of(router(tokens, info)) == pytest.approx(expected, rel=1e-14)


def test_no_groups_and_all_groups_are_raw_top_k() -> None:
    tokens = torch.randn(24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    info = token_info(12, 2, padding=[(11, 0)])
    top_k = MoEConfig(num_experts=8, router_topk=3, router_pre_softmax=True, aux_loss_coeff=0.01)
    wanted = make_router(top_k, 8)(tokens, info)
    for options in ({}, {"num_groups": "4", "topk_groups": "4"}):
        plan = make_router(deepseek(fields={"aux_loss_coeff": 0.01}, **options), 8)(tokens, info)
        assert weights_of(plan) == weights_of(wanted)
        loss, expected = plan.aux_losses["load_balance_loss"], wanted.aux_losses["load_balance_loss"]
        assert (loss.share.item(), loss.weight, loss.per) == (expected.share.item(), 0.01, "group")
    limited = make_router(deepseek(**GROUPS), 8)(tokens, info)
    assert pairs(limited) != pairs(wanted)


@pytest.mark.parametrize(
    ("method", "options"), [("greedy", {}), ("group_limited_greedy", {"num_groups": "4", "topk_groups": "2"})]
)
def test_choice_and_weights_are_those_of_transformers(method: str, options: dict[str, str]) -> None:
    sizes = {"hidden_size": 16, "n_routed_experts": 16, "num_experts_per_tok": 5, "n_group": 4, "topk_group": 2}
    known = DeepseekV2Config(**sizes, num_attention_heads=4, topk_method=method, routed_scaling_factor=16.0)
    gate = DeepseekV2TopkRouter(known)
    router = make_router(deepseek(16, 5, route_scale="16", **options), 16, dtype=torch.float32)
    with torch.no_grad():
        gate.weight.copy_(router.get_parameter("weight"))
    tokens = torch.randn(200, 16)
    answer = gate(tokens)
    expert_ids = next(value for value in answer if not value.is_floating_point())
    weights = next(value for value in answer if value.is_floating_point() and value.shape == expert_ids.shape)
    wanted = torch.zeros(200, 16).scatter_(1, expert_ids, weights.detach())
    plan = router(tokens, token_info(200))
    found = torch.zeros(200, 16).scatter_(1, plan.expert_ids.view(200, 5), plan.combine_weights.detach().view(200, 5))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def slow_losses(scores: Tensor, chosen: list[list[int]], *, num: int, kept: int) -> tuple[float, float, float]:
    """Expert-level, device-level and communication loss of one group of tokens, as eq. 23-31 say them."""
    tokens, experts = scores.shape
    choices, width = len(chosen[0]), experts // num
    f = [experts / (choices * tokens) * sum(e in row for row in chosen) for e in range(experts)]
    p = [float(scores[:, e].sum()) / tokens for e in range(experts)]
    members = [range(d * width, (d + 1) * width) for d in range(num)]
    p_group = [sum(p[e] for e in group) for group in members]
    f_device = [sum(f[e] for e in group) / width for group in members]
    sent = [sum(any(e in group for e in row) for row in chosen) for group in members]
    f_sent = [num / (kept * tokens) * count for count in sent]
    pairs_of = ((f, p), (f_device, p_group), (f_sent, p_group))
    expert, device, communication = (sum(a * b for a, b in zip(*pair, strict=True)) for pair in pairs_of)
    return expert, device, communication


LOSSES = {"device_loss_coeff": "0.05", "communication_loss_coeff": "0.02"}


def loss_shares(router: Router, tokens: Tensor, info: TokenInfo) -> tuple[float, float, float]:
    found = router(tokens, info).aux_losses
    expert, device, sent = found["load_balance_loss"], found["device_loss"], found["communication_loss"]
    assert (expert.weight, device.weight, sent.weight) == (0.003, 0.05, 0.02)
    assert expert.per == device.per == sent.per == "group"
    return expert.share.item(), device.share.item(), sent.share.item()


def test_the_golden_losses_come_out_by_hand() -> None:
    config = deepseek(4, 2, fields={"aux_loss_coeff": 0.003}, num_groups="2", topk_groups="2", **LOSSES)
    router, tokens = golden_router(config)
    expert, device, sent = loss_shares(router, tokens, token_info(6))
    # choices 01 01 01 12 01 30: group 0 has 10 of 12 assignments, and 6 + 2 tokens are sent
    assert expert == pytest.approx(1.3189, abs=1e-4)
    assert device == pytest.approx(2 * (10 / 12 * 0.7392 + 2 / 12 * 0.2608), abs=1e-4)
    assert sent == pytest.approx(2 / (2 * 6) * (6 * 0.7392 + 2 * 0.2608), abs=1e-4)


@pytest.mark.parametrize(("experts", "num", "kept", "choices"), [(8, 4, 2, 3), (12, 3, 2, 5), (6, 2, 2, 4)])
def test_losses_equal_the_loop_in_each_group_without_padding(experts: int, num: int, kept: int, choices: int) -> None:
    options = {"num_groups": str(num), "topk_groups": str(kept), **LOSSES}
    router = identity_router(deepseek(experts, choices, fields={"aux_loss_coeff": 0.003}, **options))
    info = token_info(9, 3, group_samples=2, padding=[(8, 0), (7, 0), (8, 2)])
    tokens = torch.randn(27, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    wanted = [0.0, 0.0, 0.0]
    for group in range(2):
        rows = tokens[(info.groups == group) & ~info.is_padding]
        chosen = [slow_choice(row, choices, num=num, kept=kept, best=1) for row in rows.tolist()]
        values = slow_losses(rows.softmax(1), chosen, num=num, kept=kept)
        wanted = [total + value for total, value in zip(wanted, values, strict=True)]
    assert loss_shares(router, tokens, info) == pytest.approx(tuple(wanted), rel=1e-12)
    assert len({round(value, 6) for value in wanted}) == 3
    assert not router(tokens, token_info(9, 3, train=False)).aux_losses


def test_even_scores_make_every_loss_one() -> None:
    router = identity_router(deepseek(fields={"aux_loss_coeff": 0.003}, **GROUPS, **LOSSES))
    shares = loss_shares(router, torch.zeros(5, 8, dtype=torch.float64), token_info(5))
    # communication counts tokens, at most M groups each: three experts of width two are in both
    assert shares == pytest.approx((1.0, 1.0, 1.0), rel=1e-12)


# who wants to go to which of two groups of two experts, and how much
CROWD = [[0.0, -0.2, -9.0, -9.0], [2.0, 0.0, -9.0, -9.0], [1.0, 0.5, -9.0, -9.0], [-9.0, -9.0, 1.0, 0.0]]


def served(tokens: Tensor, info: TokenInfo, **fields: Any) -> set[tuple[int, int]]:
    config = deepseek(4, 2, fields=fields, num_groups="2", topk_groups="1")
    router = identity_router(config)
    plan: RoutingPlan = router(tokens, info)
    return pairs(make_limit(config, router.choices(config), NOBODY, router.expert_pools)(plan, info))


def test_a_group_shares_its_places_and_drops_the_lowest_scores_by_themselves() -> None:
    tokens = torch.tensor(CROWD, dtype=torch.float64)
    asked = {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 2), (3, 3)}
    # places for 2 tokens of k = 2 in each group: the scores for group 0 are .55 .45, .88 .12 and .62 .38
    kept = served(tokens, token_info(4), expert_capacity_factor=1.0, token_drop_policy="probs")
    assert kept == asked - {(1, 1), (2, 1)}
    assert served(tokens, token_info(4), expert_capacity_factor=1.0) == asked - {(2, 0), (2, 1)}


def test_a_factor_of_the_number_of_groups_drops_nobody_in_evaluation() -> None:
    tokens = torch.tensor(CROWD, dtype=torch.float64)[:3]
    factors = {"expert_capacity_factor": 1.0, "eval_capacity_factor": 2.0, "token_drop_policy": "probs"}
    assert len(served(tokens, token_info(3, train=False), **factors)) == 6
    assert len(served(tokens, token_info(3), **factors)) == 4


def test_without_groups_each_expert_has_its_own_places() -> None:
    assert make_router(deepseek(), 8).expert_pools is None
    assert make_router(deepseek(**GROUPS), 8).expert_pools == 4


def test_the_scale_reaches_the_gradient() -> None:
    grads = []
    for scale in ("1", "16"):
        router, tokens = golden_router(deepseek(4, 2, route_scale=scale))
        router(tokens, token_info(6)).combine_weights.square().sum().backward()
        grad = router.get_parameter("weight").grad
        assert grad is not None
        grads.append(grad)
    torch.testing.assert_close(grads[1], 256 * grads[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (deepseek(num_groups="4"), r"num_groups=4 without topk_groups .* give topk_groups too \(4 = no limit\)"),
        (deepseek(topk_groups="2"), r"topk_groups=2 without num_groups .* give both or neither"),
        (deepseek(num_groups="3", topk_groups="2"), r"num_groups=3: --num-experts 8 .* use a divisor of 8"),
        (deepseek(num_groups="4", topk_groups="5"), r"topk_groups=5 is more than num_groups=4; use 4"),
        (deepseek(choices=5, **GROUPS), r"--moe-router-topk 5 .* topk_groups=2 groups of 2 .* topk_groups=3 or more"),
        (deepseek(num_groups="1", topk_groups="1"), r"num_groups=1: expected an integer of at least 2"),
        (deepseek(device_loss_coeff="0.05"), r"device_loss_coeff=0.05 has no effect without groups"),
        (deepseek(communication_loss_coeff="0.02"), r"communication_loss_coeff=0.02 has no effect without groups"),
        (deepseek(route_scale="0"), r"route_scale=0: expected a number above 0"),
        (deepseek(fields={"capacity_includes_k": False}, **GROUPS), r"--no-moe-capacity-includes-k has no effect"),
        (deepseek(fields={"router_pre_softmax": True}), r"--moe-router-pre-softmax"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(config: MoEConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(config, 8, Site(NOBODY))
