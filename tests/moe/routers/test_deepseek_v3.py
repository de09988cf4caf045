"""DeepSeek-V3: worked numbers, the bias that balances, the loss of each sample."""

from typing import Any

import pytest
import torch
from moe_rows import NOBODY, make_router, rows_of, token_info, tp_state, weights_of
from ranks import run_on_ranks
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.certify.tiny_run import outcome_of, run_all
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.routers.router import Router, Site
from megatron_moe.parallel.collectives import sum_over
from megatron_moe.parallel.state import Axis

LOGITS = [1.0, -0.5, 0.2, 0.8, -1.0, 1.5, 0.1, 0.0]
BIAS = [0.0, 0.0, 0.0, 0.05, 0.0, -0.30, 0.10, 0.0]
GROUPS = {"num_groups": "4", "topk_groups": "2"}


def deepseek_v3(
    experts: int = 8, choices: int = 3, *, fields: dict[str, Any] | None = None, **options: str
) -> MoEConfig:
    return MoEConfig(
        num_experts=experts, router_topk=choices, router_type="deepseek_v3", router_options=options, **(fields or {})
    )


def biased_router(config: MoEConfig, bias: list[float] | None = None) -> Router:
    """Its logits are its tokens."""
    router = make_router(config, config.num_experts)
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(config.num_experts))
        if bias is not None:
            router.get_buffer("expert_bias").copy_(torch.tensor(bias))
    return router


def requested(load: list[float]) -> dict[str, Tensor]:
    return {"requested": torch.tensor(load, dtype=torch.float64)}


def test_the_worked_choice_and_weights_come_out() -> None:
    router = biased_router(deepseek_v3(**GROUPS), BIAS)
    plan = router(torch.tensor([LOGITS], dtype=torch.float64), token_info(1))
    assert plan.expert_ids.tolist() == [3, 6, 2]
    assert plan.combine_weights.tolist() == pytest.approx([0.9774, 0.7437, 0.7789], abs=1e-4)


def test_the_bias_decides_but_weighs_nothing() -> None:
    tokens = torch.tensor([LOGITS], dtype=torch.float64)
    free = weights_of(biased_router(deepseek_v3())(tokens, token_info(1)))
    assert set(free) == {(0, 5), (0, 0), (0, 3)}
    # the same three wherever the bias does not change the choice
    assert weights_of(biased_router(deepseek_v3(), [0.3, 0, 0, 0.3, 0, 0.3, 0, 0])(tokens, token_info(1))) == free
    pushed = biased_router(deepseek_v3(), [0, 0, 0, 0, 9.0, 0, 0, 0])(tokens, token_info(1))
    assert pushed.expert_ids.tolist() == [4, 5, 0]
    scores = torch.tensor(LOGITS, dtype=torch.float64).sigmoid()[[4, 5, 0]]
    torch.testing.assert_close(pushed.combine_weights, 2.5 * scores / scores.sum())


def test_the_gradient_goes_through_the_scores_of_the_chosen_only() -> None:
    tokens = torch.tensor([LOGITS], dtype=torch.float64, requires_grad=True)
    router = biased_router(deepseek_v3(**GROUPS), BIAS)
    router(tokens, token_info(1)).combine_weights[0].backward()
    s = torch.tensor(LOGITS, dtype=torch.float64).sigmoid()
    share = s[[3, 6, 2]] / s[[3, 6, 2]].sum()
    wanted = torch.zeros(8, dtype=torch.float64)
    # d (s_3 / Σ s) / d z_e = share_3 (1[e = 3] - share_e) (1 - s_e)
    for place, expert in enumerate([3, 6, 2]):
        wanted[expert] = 2.5 * share[0] * (float(expert == 3) - share[place]) * (1 - s[expert])
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad[0], wanted)
    assert not router.get_buffer("expert_bias").requires_grad


@pytest.mark.parametrize(("score", "scale"), [("sigmoid", "2.5"), ("softmax", "1")])
def test_weights_of_a_token_sum_to_the_scale_even_where_scores_vanish(score: str, scale: str) -> None:
    router = biased_router(deepseek_v3(score=score, route_scale=scale))
    tokens = torch.stack([torch.linspace(-1, 1, 8) - 900, torch.linspace(0, 2, 8), torch.zeros(8)]).double()
    weights = router(tokens, token_info(3)).combine_weights.view(3, 3)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.full((3,), float(scale), dtype=torch.float64))
    # of vanishing sigmoids the ratios are those of exponentials
    if score == "sigmoid":
        assert weights[0].max() > 1.2 * weights[0].min()


def test_softmax_scores_without_a_bias_are_plain_top_k() -> None:
    tokens = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    info = token_info(24)
    for extra in ({}, {"num_groups": "4", "topk_groups": "4"}):
        router = make_router(deepseek_v3(score="softmax", route_scale="1", **extra), 6)
        plain = make_router(MoEConfig(num_experts=8, router_topk=3), 6)
        assert weights_of(router(tokens, info)) == pytest.approx(weights_of(plain(tokens, info)), rel=1e-12)


@pytest.mark.parametrize(
    ("choices", "kept", "expected"), [(3, 2, [7, 3, 2]), (4, 2, [5, 4, 1, 0]), (3, 3, [7, 3, 5]), (2, 3, [7, 3])]
)
def test_group_scores_may_follow_the_paper(choices: int, kept: int, expected: list[int]) -> None:
    # by the best one, groups 3 and 1 lead; by the sum of two, groups 2 and 0
    tokens = torch.tensor([[1.99, 2.0, -9.0, 2.5, 2.01, 2.02, -9.0, 3.0]], dtype=torch.float64)
    config = deepseek_v3(8, choices, num_groups="4", topk_groups=str(kept), group_score_experts="none")
    assert biased_router(config)(tokens, token_info(1)).expert_ids.tolist() == expected


@pytest.mark.parametrize(
    "groups", [{}, {"num_groups": "4", "topk_groups": "2"}, {"num_groups": "8", "topk_groups": "3"}]
)
def test_choice_and_weights_are_those_of_transformers(groups: dict[str, str]) -> None:
    sizes = {"hidden_size": 16, "n_routed_experts": 16, "num_experts_per_tok": 5, "routed_scaling_factor": 2.5}
    limits = {"n_group": int(groups.get("num_groups", 1)), "topk_group": int(groups.get("topk_groups", 1))}
    gate = DeepseekV3TopkRouter(DeepseekV3Config(**sizes, **limits, norm_topk_prob=True))
    router = make_router(deepseek_v3(16, 5, **groups), 16, dtype=torch.float32)
    bias = 0.2 * torch.randn(16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        gate.weight.copy_(router.get_parameter("weight"))
        gate.e_score_correction_bias.copy_(bias)
        router.get_buffer("expert_bias").copy_(bias)
    tokens = torch.randn(300, 16, generator=torch.Generator().manual_seed(5))
    answer = gate(tokens)
    expert_ids = next(value for value in answer if not value.is_floating_point())
    weights = next(value for value in answer if value.is_floating_point() and value.shape == expert_ids.shape)
    wanted = torch.zeros(300, 16).scatter_(1, expert_ids, weights.detach())
    plan = router(tokens, token_info(300))
    found = torch.zeros(300, 16).scatter_(1, plan.expert_ids.view(300, 5), plan.combine_weights.detach().view(300, 5))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_worked_sequence_loss_comes_out() -> None:
    scores = torch.tensor([[0.9, 0.3, 0.2, 0.1], [0.8, 0.4, 0.3, 0.2]], dtype=torch.float64)
    # a bias or a limit on groups changes who serves, not what the loss counts
    for options, bias in (
        ({}, [0.0] * 4),
        ({}, [0.0, 0, 9, 9]),
        ({"num_groups": "2", "topk_groups": "1"}, [0.0, 0, 9, 9]),
    ):
        router = biased_router(deepseek_v3(4, 2, sequence_loss_coeff="0.0001", **options), bias)
        loss = router(scores.logit(), token_info(2)).aux_losses["sequence_loss"]
        assert loss.share.item() == pytest.approx(1.5059, abs=1e-4)
        assert (loss.weight, loss.per) == (0.0001, "sequence")
    assert not router(scores.logit(), token_info(2, train=False)).aux_losses


def test_the_sequence_loss_is_that_of_each_sample_whatever_its_group() -> None:
    router = make_router(deepseek_v3(sequence_loss_coeff="0.1"), 6)
    tokens = torch.randn(21, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    padding = [(6, 0), (5, 0), (6, 2)]
    info = token_info(7, 3, group_samples=3, padding=padding)
    wanted = 0.0
    for sample in range(3):
        rows = tokens[(info.sequences == sample) & ~info.is_padding]
        s = (rows @ router.get_parameter("weight").detach().T).sigmoid()
        count = torch.zeros(8, dtype=torch.float64).index_add(
            0, s.topk(3).indices.flatten(), torch.ones(3 * len(rows), dtype=torch.float64)
        )
        f, p = 8 / (3 * len(rows)) * count, (s / s.sum(1, keepdim=True)).mean(0)
        wanted += float((f * p).sum())
    for group_samples in (1, 3):
        info = token_info(7, 3, group_samples=group_samples, padding=padding)
        share = router(tokens, info).aux_losses["sequence_loss"].share.item()
        assert share == pytest.approx(wanted, rel=1e-12)


def test_the_worked_bias_update_comes_out() -> None:
    router = biased_router(deepseek_v3(4, 2))
    router.after_step(requested([10, 2, 4, 8]), {})
    assert router.get_buffer("expert_bias").tolist() == pytest.approx([-0.001, 0.001, 0.001, -0.001], rel=1e-12)
    router.after_step(requested([7, 6, 6, 5]), {})
    assert router.get_buffer("expert_bias").tolist() == pytest.approx([-0.002, 0.001, 0.001, 0.0], abs=1e-12)


def test_a_load_equal_to_the_mean_leaves_the_bias_even_where_the_mean_is_no_float() -> None:
    router = make_router(deepseek_v3(7, 3), 6, dtype=torch.float32)
    for load in ([5.0] * 7, [0.0] * 7, [float(2**30 + 1)] * 7):
        router.after_step(requested(load), {})
        assert not router.get_buffer("expert_bias").any()
    router.after_step(requested([1, 0, 0, 0, 0, 0, 0]), {})
    assert router.get_buffer("expert_bias").sign().tolist() == [-1, 1, 1, 1, 1, 1, 1]


def test_the_rate_is_an_option_and_ends_when_told() -> None:
    load = requested([10, 2, 4, 8])
    router = biased_router(deepseek_v3(4, 2, bias_update_rate="0.5", bias_update_until="0.75"))
    moved = []
    for progress in (0.0, 0.5, 0.75, 0.9):
        router.before_step(progress)
        router.after_step(load, {})
        moved.append(router.get_buffer("expert_bias")[1].item())
    assert moved == [0.5, 1.0, 1.0, 1.0]
    frozen = biased_router(deepseek_v3(4, 2, bias_update_rate="0"), [0.1, 0.2, 0.3, 0.4])
    frozen.before_step(0.0)
    frozen.after_step(load, {})
    assert torch.equal(frozen.get_buffer("expert_bias"), torch.tensor([0.1, 0.2, 0.3, 0.4]).double())


def violations_of(config: MoEConfig, steps: int) -> list[float]:
    """(largest load - mean) / mean at each step, of a stream in which nearly every token wants the same two experts."""
    router = biased_router(config)
    skew = torch.tensor([2.0, 1.5, 0.3, 0.0, 0.0, -0.3, -0.5, -1.0], dtype=torch.float64)
    info = token_info(512)
    found = []
    for step in range(steps):
        tokens = skew + torch.randn(512, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        plan = router(tokens, info)
        load = plan.tokens_per_expert().double()
        found.append(float(load.max() / load.mean()) - 1)
        router.after_step({"requested": load, **plan.stats}, {})
    return found


def test_biases_balance_a_skewed_stream_of_tokens() -> None:
    violations = violations_of(deepseek_v3(8, 2, bias_update_rate="0.005"), 250)
    first, last = sum(violations[:10]) / 10, sum(violations[-10:]) / 10
    assert first > 1.5
    assert last < 0.3
    assert sum(violations[100:110]) / 10 < sum(violations[20:30]) / 10 < first


def test_quantiles_balance_the_stream_in_a_few_steps() -> None:
    violations = violations_of(deepseek_v3(8, 2, balance="quantile"), 20)
    assert violations[0] > 1.5
    assert max(violations[5:]) < 0.4


def slow_quantiles(scores: Tensor, bias: Tensor, choices: int) -> list[float]:
    """For one group: what T·k // E of its tokens exceed in each expert's score less the token's (k+1)-th best."""
    rows = [(row, sorted((row + bias).tolist(), reverse=True)[choices]) for row in scores]
    exceeding = len(rows) * choices // scores.shape[1]
    return [sorted((float(row[e]) - cut for row, cut in rows), reverse=True)[exceeding] for e in range(scores.shape[1])]


def test_quantile_biases_are_the_mean_of_the_groups_quantiles() -> None:
    router = biased_router(deepseek_v3(8, 3, balance="quantile"), BIAS)
    # the last group is padding only: it has no say
    info = token_info(9, 5, group_samples=2, padding=[(8, 0), (7, 0), (8, 3), *((p, 4) for p in range(9))])
    tokens = torch.randn(45, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    stats = router(tokens, info).stats
    bias, wanted = router.get_buffer("expert_bias").clone(), torch.zeros(8, dtype=torch.float64)
    for group in range(2):
        rows = tokens[(info.groups == group) & ~info.is_padding]
        wanted -= torch.tensor(slow_quantiles(rows.sigmoid(), bias, 3), dtype=torch.float64) / 2
    assert stats["quantile_groups"] == 2
    router.after_step(stats, {})
    torch.testing.assert_close(router.get_buffer("expert_bias"), wanted, rtol=1e-12, atol=1e-14)
    assert "quantile_sum" not in router(tokens, token_info(9, 5, train=False)).stats


def test_quantiles_of_tokens_that_stand_still_make_the_loads_even() -> None:
    router = biased_router(deepseek_v3(3, 2, balance="quantile"))
    tokens = torch.randn(301, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) + torch.tensor(
        [3, 0, 1]
    )
    for _ in range(12):
        plan = router(tokens, token_info(301))
        router.after_step(plan.stats, {})
    load = router(tokens, token_info(301)).tokens_per_expert()
    assert int(load.max() - load.min()) <= 4


EACH_RULE = ({"bias_update_rate": "0.01"}, {"balance": "quantile"})


def after_a_step(axis: Axis, rows: Tensor, options: dict[str, str]) -> tuple[list[float], float]:
    """The bias after a step in which this rank held these rows of 21; how many groups spoke for a quantile."""
    router = make_router(deepseek_v3(**options), 6, axis=axis)
    tokens = torch.randn(21, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    plan = router(tokens[rows], rows_of(token_info(7, 3), rows))
    stats = {"requested": plan.tokens_per_expert(), **plan.stats}
    summed = {name: sum_over(value.double(), axis) for name, value in sorted(stats.items())}
    router.after_step(summed, {})
    return router.get_buffer("expert_bias").tolist(), summed.get("quantile_groups", torch.zeros(())).item()


def biases_on_rank(rank: int, world_size: int) -> list[tuple[list[float], float]]:
    axis = tp_state(rank, world_size).tp_cp
    return [after_a_step(axis, torch.arange(21)[rank::world_size], options) for options in EACH_RULE]


def test_ranks_that_share_the_tokens_move_the_biases_alike() -> None:
    alone = [after_a_step(NOBODY, torch.arange(21), options) for options in EACH_RULE]
    assert all(any(bias) for bias, _ in alone)
    assert [groups for _, groups in alone] == [0, 3]
    for answer in run_on_ranks(4, biases_on_rank):
        for (bias, groups), (expected, spoke) in zip(answer, alone, strict=True):
            assert bias == pytest.approx(expected, rel=1e-12)
            assert groups == spoke


def trained_biases(world_size: int, parallel: dict[str, Any], micro_batch: int) -> dict[str, list[float]]:
    """Each sparse layer's biases after three steps of a tiny model."""
    moe = {"router_type": "deepseek_v3", "router_options": {"bias_update_rate": "0.01"}}
    config = tiny_config(moe, parallel, {}, micro_batch)
    outcome = outcome_of([ranks[0] for ranks in run_on_ranks(world_size, run_all, [config])])
    return {name: value.tolist() for name, value in outcome.weights.items() if name.endswith("expert_bias")}


def test_training_moves_the_biases_by_the_same_loads_on_every_layout() -> None:
    wanted = trained_biases(1, {}, 1)
    assert len(wanted) == 2
    assert all(abs(value) <= 0.03 + 1e-12 for biases in wanted.values() for value in biases)
    assert all(any(biases) for biases in wanted.values())
    assert trained_biases(1, {}, 4) == wanted
    assert trained_biases(2, {"tensor_model_parallel_size": 2}, 2) == wanted
    assert trained_biases(2, {}, 1) == wanted
    assert trained_biases(2, {"pipeline_model_parallel_size": 2}, 1) == wanted


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (deepseek_v3(choices=1), r"--moe-router-topk 1 with deepseek_v3 .* without a gradient"),
        (deepseek_v3(num_groups="4"), r"num_groups=4 without topk_groups"),
        (deepseek_v3(num_groups="3", topk_groups="2"), r"use a divisor of 8"),
        (deepseek_v3(choices=5, **GROUPS), r"--moe-router-topk 5 .* topk_groups=3 or more"),
        (
            deepseek_v3(num_groups="8", topk_groups="4"),
            r"group_score_experts=2: num_groups=8 .* only 1 .* use 1 or fewer",
        ),
        (deepseek_v3(group_score_experts="none"), r"group_score_experts=none has no effect without groups"),
        (deepseek_v3(group_score_experts="1"), r"group_score_experts=1 has no effect without groups"),
        (deepseek_v3(score="relu"), r"score=relu: expected sigmoid or softmax"),
        (deepseek_v3(bias_update_rate="0", bias_update_until="0.9"), r"bias_update_until=0.9 has no effect"),
        (deepseek_v3(bias_update_until="0"), r"bias_update_until=0: expected"),
        (deepseek_v3(balance="quantile", **GROUPS), r"balance=quantile knows no groups"),
        (
            deepseek_v3(balance="quantile", bias_update_rate="0"),
            r"bias_update_rate=0 has no effect with balance=quantile",
        ),
        (deepseek_v3(choices=8, balance="quantile"), r"--moe-router-topk 8 takes every expert"),
        (deepseek_v3(fields={"aux_loss_coeff": 0.1}), r"--moe-aux-loss-coeff 0.1 has no effect"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(config: MoEConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(config, 8, Site(NOBODY))
