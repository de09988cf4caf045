"""SAM: worked numbers, a loop over tokens, what it becomes for extreme groups, its losses and their gradients."""

import math
from typing import Any

import pytest
import torch
from moe_rows import NOBODY, make_router, pairs, token_info, weights_of
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.capacity import make_limit
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router, Site
from megatron_moe.parallel.layout import layout_of

WORKED = [2.0, 0.5, 1.9, 0.4, 1.2, 1.1]
WORKED_GROUPS = [0.3, 1.0, -0.2]


def sam_config(
    experts: int, groups: int, choices: int, options: dict[str, str] | None = None, **fields: Any
) -> MoEConfig:
    given = {"groups": str(groups), **(options or {})}
    return MoEConfig(num_experts=experts, router_topk=choices, router_type="sam", router_options=given, **fields)


def identity_router(config: MoEConfig) -> Router:
    """Its logits are the tokens: E features, and G more when hierarchical."""
    groups = int(config.router_options["groups"]) if config.router_options.get("mode") == "hierarchical" else 0
    router = make_router(config, config.num_experts + groups)
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(config.num_experts, config.num_experts + groups))
        if groups:
            router.get_parameter("group_weight").copy_(torch.eye(config.num_experts + groups)[-groups:])
    return router


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in logits)
    return [math.exp(value) / total for value in logits]


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def slow_sam(
    logits: list[float], experts: int, groups: int, choices: int, *, renormalise: bool
) -> list[tuple[int, float]]:
    """(expert, weight) of one token, best first; as many further logits as groups when hierarchical."""
    width = experts // groups
    inner = [logits[g * width : (g + 1) * width] for g in range(groups)]
    if len(logits) == experts:
        scores = softmax(logits)
        group = best([sum(scores[g * width : (g + 1) * width]) for g in range(groups)], 1)[0]
        weights = scores[group * width : (group + 1) * width]
        factor = 1.0
    else:
        group_scores = softmax(logits[experts:])
        group = best(group_scores, 1)[0]
        weights, factor = softmax(inner[group]), group_scores[group]
    chosen = best(inner[group], choices)
    total = sum(weights[e] for e in chosen) if renormalise else 1.0
    return [(group * width + e, factor * weights[e] / total) for e in chosen]


def shares(plan: RoutingPlan) -> dict[str, float]:
    return {name: loss.share.item() for name, loss in plan.aux_losses.items()}


def test_the_worked_token_in_one_softmax() -> None:
    config = sam_config(6, 3, 2, {"align_coeff": "1"}, aux_loss_coeff=0.01)
    plan = identity_router(config)(torch.tensor([WORKED]).double(), token_info(1))
    assert plan.expert_ids.tolist() == [0, 1]
    assert plan.combine_weights.tolist() == pytest.approx([0.3139, 0.0700], abs=1e-4)
    assert plan.aux_losses["alignment_loss"].share.item() == pytest.approx(0.3426, abs=1e-4)
    # one token: f is 1 for each of its experts
    assert shares(plan)["load_balance_loss"] == pytest.approx(6 * (0.3139 + 0.0700), abs=1e-3)
    assert plan.confidence is not None and plan.confidence.tolist() == pytest.approx([0.3839], abs=1e-4)
    assert plan.indivisible


def test_the_worked_token_in_two_steps() -> None:
    config = sam_config(6, 3, 2, {"mode": "hierarchical"}, aux_loss_coeff=0.01, z_loss_coeff=0.001)
    plan = identity_router(config)(torch.tensor([WORKED + WORKED_GROUPS]).double(), token_info(1))
    assert plan.expert_ids.tolist() == [2, 3]
    assert plan.combine_weights.tolist() == pytest.approx([0.4548, 0.1015], abs=1e-4)
    assert plan.confidence is not None and plan.confidence.tolist() == pytest.approx([0.5562], abs=1e-4)
    assert shares(plan)["load_balance_loss"] == pytest.approx(3 * 0.5562, abs=1e-3)
    # both experts of the group were chosen: 2 · (r_0 + r_1)
    assert shares(plan)["expert_balance_loss"] == pytest.approx(2.0)
    lse = [math.log(sum(map(math.exp, part))) for part in (WORKED_GROUPS, [1.9, 0.4])]
    assert shares(plan)["z_loss"] == pytest.approx(lse[0] ** 2 + lse[1] ** 2)
    experts = ([2.0, 0.5], [1.9, 0.4], [1.2, 1.1])
    joint = [q * r for q, pair in zip(softmax(WORKED_GROUPS), experts, strict=True) for r in softmax(pair)]
    assert plan.stats["confidence_sum"].item() == pytest.approx(max(joint))
    assert plan.stats["entropy_sum"].item() == pytest.approx(-sum(p * math.log(p) for p in joint))


@pytest.mark.parametrize("mode", ["flat", "hierarchical"])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("experts", "groups", "choices"), [(9, 3, 2), (8, 2, 3), (12, 3, 3), (12, 4, 2)])
def test_sam_equals_the_loop(mode: str, renormalise: bool, experts: int, groups: int, choices: int) -> None:
    options = {"mode": mode, "renormalise": str(renormalise).lower()}
    router = identity_router(sam_config(experts, groups, choices, options))
    info = token_info(8, 3, padding=[(7, 0)])
    tokens = torch.randn(24, router.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plan = router(tokens, info)
    found = weights_of(plan)
    for token, logits in enumerate(tokens.tolist()):
        expected = slow_sam(logits, experts, groups, choices, renormalise=renormalise)
        if info.is_padding[token]:
            assert not any((token, expert) in found for expert in range(experts))
        else:
            assert [found[token, expert] for expert, _ in expected] == pytest.approx(
                [w for _, w in expected], rel=1e-12
            )
            assert plan.expert_ids.view(24, choices)[token].tolist() == [expert for expert, _ in expected]
    assert len(found) == 23 * choices


def same_plan(first: RoutingPlan, second: RoutingPlan) -> None:
    assert torch.equal(first.expert_ids, second.expert_ids)
    torch.testing.assert_close(first.combine_weights, second.combine_weights, rtol=1e-13, atol=0)
    assert shares(first) == pytest.approx(shares(second), rel=1e-13)
    assert {n: v.item() for n, v in first.stats.items()} == pytest.approx(
        {n: v.item() for n, v in second.stats.items()}
    )


LOSSES = {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001}


@pytest.mark.parametrize("policy", ["position", "probs", "bpr"])
def test_one_expert_in_each_group_is_switch(policy: str) -> None:
    places = {"expert_capacity_factor": 0.8, "token_drop_policy": policy}
    info = token_info(9, 4, group_samples=2, padding=[(8, 0)])
    tokens = torch.randn(36, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sam = sam_config(6, 6, 1, **LOSSES, **places)
    switch = MoEConfig(num_experts=6, router_type="switch", router_options={"jitter_eps": "0"}, **LOSSES, **places)
    plans = [make_router(config, 5)(tokens, info) for config in (sam, switch)]
    same_plan(*plans)
    limited = [make_limit(sam, 1, NOBODY, 6)(plans[0], info), make_limit(switch, 1, NOBODY)(plans[1], info)]
    assert pairs(limited[0]) == pairs(limited[1])
    assert len(pairs(limited[0])) < 35


@pytest.mark.parametrize("renormalise", ["false", "true"])
def test_one_group_is_top_k_with_raw_weights(renormalise: str) -> None:
    info = token_info(9, 4, group_samples=2, padding=[(8, 0)])
    tokens = torch.randn(36, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sam = sam_config(6, 1, 3, {"renormalise": renormalise}, **LOSSES)
    options = {"balance": "all_choices", "renormalise": renormalise}
    top_k = MoEConfig(num_experts=6, router_topk=3, router_pre_softmax=True, router_options=options, **LOSSES)
    same_plan(*[make_router(config, 5)(tokens, info) for config in (sam, top_k)])


def random_logits(seed: int, experts: int) -> Tensor:
    return torch.randn(1, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_alignment_is_zero_just_when_the_chosen_are_the_best_of_all() -> None:
    seen = set()
    for seed in range(60):
        logits = random_logits(seed, 6)
        plan = identity_router(sam_config(6, 3, 2, {"align_coeff": "1"}))(logits, token_info(1))
        is_best = set(plan.expert_ids.tolist()) == set(logits[0].topk(2).indices.tolist())
        assert (shares(plan)["alignment_loss"] == 0) is is_best
        seen.add(is_best)
    assert seen == {True, False}


def test_alignment_pushes_down_what_beats_the_chosen_and_leaves_the_threshold_alone() -> None:
    config = sam_config(6, 3, 2, {"align_coeff": "0.5"})
    router = identity_router(config)
    info = token_info(3, 2, padding=[(1, 0)])
    tokens = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    plan = router(tokens, info)
    loss = plan.aux_losses["alignment_loss"]
    assert (loss.weight, loss.per) == (0.5, "token")
    (gradient,) = torch.autograd.grad(loss.share, tokens)
    ids = plan.expert_ids.view(6, 2).clamp(max=5)
    still = tokens.softmax(dim=1).gather(1, ids[:, 1:]).detach()

    def share(logits: Tensor) -> Tensor:
        excess = (logits.softmax(dim=1) - still).clamp(min=0)
        outside = torch.arange(6) // 2 != ids[:, :1] // 2
        return (excess * outside)[~info.is_padding].sum()

    assert share(tokens).item() == pytest.approx(loss.share.item(), rel=1e-13)
    assert loss.share.item() > 0
    step = 1e-6
    for row in range(6):
        for column in range(6):
            moved = torch.zeros(6, 6, dtype=torch.float64)
            moved[row, column] = step
            slope = (share(tokens + moved) - share(tokens - moved)).item() / (2 * step)
            assert gradient[row, column].item() == pytest.approx(slope, abs=1e-8)
    by_sum = identity_router(sam_config(6, 3, 2, {"align_coeff": "0.5", "align_reduction": "sum"}))(tokens, info)
    assert by_sum.aux_losses["alignment_loss"].per == "group"
    assert shares(by_sum) == shares(plan)


def slow_expert_balance(rows: list[list[float]], info: TokenInfo, experts: int, groups: int, choices: int) -> float:
    """Σ over routing groups and groups of experts: T_g/T · W · Σ_e f_e · P_e."""
    width, answer = experts // groups, 0.0
    real = [row for row in range(len(rows)) if not info.is_padding[row]]
    for routing_group in range(info.num_groups):
        tokens = [row for row in real if info.groups[row] == routing_group]
        for group in range(groups):
            arrived = [row for row in tokens if best(rows[row][experts:], 1)[0] == group]
            for expert in range(width * bool(arrived)):
                inner = [rows[row][group * width : (group + 1) * width] for row in arrived]
                fraction = sum(expert in best(logits, choices) for logits in inner) / len(arrived)
                mean = sum(softmax(logits)[expert] for logits in inner) / len(arrived)
                answer += len(arrived) / len(tokens) * width * fraction * mean
    return answer


@pytest.mark.parametrize("choices", [1, 2])
def test_balance_within_groups_counts_the_tokens_that_they_received(choices: int) -> None:
    router = identity_router(sam_config(12, 4, choices, {"mode": "hierarchical", "expert_balance_coeff": "0.3"}))
    info = token_info(5, 4, group_samples=2, padding=[(4, 0), (4, 1), (0, 3)])
    tokens = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    loss = router(tokens, info).aux_losses["expert_balance_loss"]
    expected = slow_expert_balance(tokens.tolist(), info, 12, 4, choices)
    assert loss.share.item() == pytest.approx(expected, rel=1e-12)
    assert (loss.weight, loss.per) == (0.3, "group")


def test_balance_within_groups_is_the_number_of_choices_when_scores_are_even() -> None:
    config = sam_config(6, 2, 2, {"mode": "hierarchical"}, aux_loss_coeff=0.02)
    info = token_info(4)
    tokens = torch.zeros(4, 8, dtype=torch.float64)
    tokens[:, 6] = torch.tensor([1.0, -1.0, -1.0, -1.0])
    plan = identity_router(config)(tokens, info)
    assert shares(plan)["expert_balance_loss"] == pytest.approx(2.0)
    assert {name: loss.weight for name, loss in plan.aux_losses.items()} == {
        "load_balance_loss": 0.02,
        "expert_balance_loss": 0.02,
    }
    off = identity_router(
        sam_config(6, 2, 2, {"mode": "hierarchical", "expert_balance_coeff": "0"}, aux_loss_coeff=0.02)
    )
    assert set(off(tokens, info).aux_losses) == {"load_balance_loss"}


# four tokens for the first of two groups; the largest weights (2, 3) are not those surest of their group (3, 1)
FLAT = [[1.0, 0.9, 0.5, 0.5], [1.5, 1.4, -0.2, 0.0], [4.0, -9.0, 3.0, 1.0], [2.0, 2.0, -1.0, -1.0]]
IN_TWO_STEPS = [
    *([1.0, 1.0, 0.0, 0.0, 0.2, 0.0], [3.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
    *([9.0, 0.0, 0.0, 0.0, 0.9, 0.0], [1.0, 1.0, 0.0, 0.0, 1.1, 0.0]),
]


@pytest.mark.parametrize(
    ("mode", "rows", "policy", "kept"),
    [
        ("flat", FLAT, "position", {0, 1}),
        ("flat", FLAT, "probs", {2, 3}),
        ("flat", FLAT, "bpr", {3, 1}),
        ("hierarchical", IN_TWO_STEPS, "position", {0, 1}),
        ("hierarchical", IN_TWO_STEPS, "probs", {2, 1}),
        ("hierarchical", IN_TWO_STEPS, "bpr", {3, 1}),
    ],
)
def test_a_group_serves_whole_tokens(mode: str, rows: list[list[float]], policy: str, kept: set[int]) -> None:
    config = sam_config(4, 2, 2, {"mode": mode}, expert_capacity_factor=1.0, token_drop_policy=policy)
    info = token_info(4)
    router = identity_router(config)
    plan = router(torch.tensor(rows).double(), info)
    assert set(plan.expert_ids.tolist()) == {0, 1}
    assert router.expert_pools == 2
    # two places for the four tokens
    limited = make_limit(config, 2, NOBODY, router.expert_pools)(plan, info)
    assert pairs(limited) == {(token, expert) for token in kept for expert in (0, 1)}


def test_a_bias_starts_at_zero_and_moves_the_choice() -> None:
    config = sam_config(6, 3, 2, {"bias": "true"})
    router, tokens = identity_router(config), torch.tensor([WORKED]).double()
    plain = identity_router(sam_config(6, 3, 2))
    bias = router.get_parameter("bias")
    assert bias.tolist() == [0.0] * 6
    assert not layout_of(bias).decay and layout_of(bias).sum_over == ("tp",)
    assert weights_of(router(tokens, token_info(1))) == weights_of(plain(tokens, token_info(1)))
    with torch.no_grad():
        bias[5] = 2.0
    moved = list(WORKED)
    moved[5] += 2.0
    assert weights_of(router(tokens, token_info(1))) == pytest.approx(
        weights_of(plain(torch.tensor([moved]).double(), token_info(1)))
    )
    assert router(tokens, token_info(1)).expert_ids.tolist() == [5, 4]


def test_equal_scores_go_to_the_first_group_and_its_first_experts() -> None:
    for mode in ("flat", "hierarchical"):
        router = identity_router(sam_config(6, 2, 2, {"mode": mode}))
        plan = router(torch.zeros(1, router.hidden_size, dtype=torch.float64), token_info(1))
        assert plan.expert_ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_options": {}}, r"sam has to know the groups .* groups=G, a divisor of --num-experts 8"),
        ({"router_options": {"groups": "3"}}, r"groups=3: --num-experts 8 cannot .* use a divisor of 8"),
        ({"router_options": {"groups": "0"}}, r"groups=0: expected an integer of at least 1"),
        ({"router_topk": 3, "router_options": {"groups": "4"}}, r"topk 3 .* than the 2 of a group .* at most 2 groups"),
        ({"router_options": {"groups": "2", "mode": "deep"}}, r"mode=deep: expected flat or hierarchical"),
        ({"router_topk": 1, "router_options": {"groups": "2", "renormalise": "true"}}, r"without a gradient"),
        (
            {"router_topk": 1, "router_options": {"groups": "2", "mode": "hierarchical", "renormalise": "true"}},
            r"leaves the router within the groups without a gradient",
        ),
        ({"router_options": {"groups": "1", "align_coeff": "0.1"}}, r"align_coeff=0.1 has no effect with groups=1"),
        (
            {"router_options": {"groups": "2", "align_reduction": "sum"}},
            r"align_reduction=sum has no effect .* give align_",
        ),
        (
            {"router_options": {"groups": "2", "align_coeff": "0.1", "mode": "hierarchical"}},
            r"align_coeff=0.1 has no effect with mode=hierarchical",
        ),
        (
            {"router_options": {"groups": "2", "bias": "true", "mode": "hierarchical"}},
            r"bias=true has no effect with mode=hierarchical",
        ),
        (
            {"router_options": {"groups": "2", "expert_balance_coeff": "0.1"}},
            r"expert_balance_coeff=0.1 has no effect with mode=flat",
        ),
        (
            {"router_options": {"groups": "4", "mode": "hierarchical", "renormalise": "true"}},
            r"renormalise=true has no effect .* takes all experts of a group",
        ),
        (
            {"router_options": {"groups": "4", "mode": "hierarchical", "expert_balance_coeff": "0.1"}},
            r"expert_balance_coeff=0.1 has no effect .* use fewer groups",
        ),
        ({"router_options": {"groups": "1", "mode": "hierarchical"}}, r"with one group to choose"),
        (
            {"router_topk": 1, "router_options": {"groups": "8", "mode": "hierarchical"}},
            r"with one expert in each group to choose",
        ),
        (
            {"slot_priority": "k_major", "router_options": {"groups": "2"}},
            r"k_major\" has no effect with the router sam",
        ),
        ({"capacity_includes_k": False, "router_options": {"groups": "2"}}, r"no effect with the router sam"),
        ({"router_pre_softmax": True, "router_options": {"groups": "2"}}, r"no effect with the router sam"),
    ],
)
def test_what_sam_cannot_do_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(MoEConfig(num_experts=8, router_type="sam", **fields), 16, Site(NOBODY))
