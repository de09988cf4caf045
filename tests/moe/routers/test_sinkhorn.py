"""Sinkhorn: worked numbers, the plan's sums, its stop, and the difference between training and evaluation."""

from typing import Any

import pytest
import torch
from moe_rows import GOLDEN_LOGITS, golden_router, make_router, token_info, weights_of
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.routers.sinkhorn import column_scales


def draw(tokens: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64)


def sinkhorn(choices: int = 1, experts: int = 4, **options: str) -> MoEConfig:
    return MoEConfig(num_experts=experts, router_type="sinkhorn", router_topk=choices, router_options=options)


def balanced_plan(logits: Tensor, **given: Any) -> Tensor:
    """T · Pi of one group."""
    settings = {"temperature": 1.0, "tolerance": 1e-10, "iterations": 1000, **given}
    scales = column_scales(logits[None], torch.ones(1, len(logits), dtype=torch.bool), **settings)
    return (logits / settings["temperature"] + scales).softmax(dim=1)


def test_the_worked_plan_and_choices_come_out() -> None:
    logits = torch.tensor(GOLDEN_LOGITS, dtype=torch.float64)
    plan = balanced_plan(logits, tolerance=1e-4, iterations=100)
    assert plan[1].tolist() == pytest.approx([0.2139, 0.1815, 0.3341, 0.2705], abs=1e-4)
    router, tokens = golden_router(sinkhorn())
    found = router(tokens, token_info(6))
    assert found.expert_ids.tolist() == [0, 2, 0, 1, 1, 3]
    assert found.tokens_per_expert().tolist() == [2, 2, 1, 1]
    expected = [0.8808, 0.5987, 0.9526, 0.8808, 0.7109, 0.5987]
    assert found.combine_weights.tolist() == pytest.approx(expected, abs=1e-4)
    greedy = router(tokens, token_info(6, train=False))
    assert greedy.expert_ids.tolist() == [0, 0, 0, 1, 0, 3]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_rows_and_columns_of_the_plan_are_balanced_and_its_form_is_kept(temperature: float) -> None:
    logits = 3 * draw(40, 5)
    plan = balanced_plan(logits, temperature=temperature)
    torch.testing.assert_close(plan.sum(dim=0), torch.full((5,), 8.0, dtype=torch.float64), rtol=1e-4, atol=0.0)
    # diag(a) exp(z / temperature) diag(b): what is left of ln Pi has rank one in this sense
    rest = plan.log() - logits / temperature
    torch.testing.assert_close(rest - rest[:1], (rest - rest[:1])[:, :1].expand(-1, 5))


def test_weights_for_several_experts_are_the_softmax_over_all() -> None:
    router, tokens = golden_router(sinkhorn(2))
    plan = router(tokens, token_info(6))
    scores = tokens.softmax(dim=1)
    assert plan.mask().sum(dim=1).tolist() == [2] * 6
    assert weights_of(plan) == pytest.approx({(t, e): scores[t, e].item() for t, e in weights_of(plan)})
    best = balanced_plan(tokens, tolerance=1e-4).topk(2, dim=1).indices
    assert plan.expert_ids.view(6, 2).tolist() == best.tolist()


def test_loads_are_more_even_than_those_of_the_logits() -> None:
    router = make_router(sinkhorn(experts=8), 5)
    tokens = draw(256, 5) + 1.0
    loads = router(tokens, token_info(256)).tokens_per_expert()
    greedy = router(tokens, token_info(256, train=False)).tokens_per_expert()
    assert loads.max() < 64 < greedy.max()


def test_iterations_and_tolerance_stop_the_plan() -> None:
    logits = 4 * draw(30, 6)
    one = balanced_plan(logits, iterations=1)
    kernel = logits.exp()
    first = 1 / (6 * ((1 / (30 * kernel.sum(dim=1))) @ kernel))
    torch.testing.assert_close(one, (kernel * first) / (kernel * first).sum(dim=1, keepdim=True), rtol=1e-6, atol=0.0)
    errors = [
        (balanced_plan(logits, tolerance=tolerance).sum(dim=0) - 5.0).abs().max() for tolerance in (0.3, 1e-2, 1e-6)
    ]
    assert errors[0] > errors[1] > errors[2]
    # never reached: the bound alone ends it
    assert balanced_plan(logits, tolerance=0.0, iterations=50).isfinite().all()


def test_large_logits_and_padding_and_nan_do_not_spoil_a_group() -> None:
    logits = torch.tensor(GOLDEN_LOGITS, dtype=torch.float64)
    table = torch.cat([logits, torch.full((1, 4), 5000.0, dtype=torch.float64), torch.full_like(logits[:1], torch.nan)])
    is_token = torch.tensor([True] * 6 + [False, False])
    settings = {"temperature": 1.0, "tolerance": 1e-10, "iterations": 200}
    expected = column_scales(logits[None], torch.ones(1, 6, dtype=torch.bool), **settings)
    torch.testing.assert_close(column_scales(table[None], is_token[None], **settings), expected)
    # 1e4 instead of 1: without the row's largest taken out exp would overflow
    assert column_scales(logits[None] + 1e4, torch.ones(1, 6, dtype=torch.bool), **settings).isfinite().all()
    with_nan = column_scales(table[None, [0, 1, 2, 3, 4, 5, 7]], torch.ones(1, 7, dtype=torch.bool), **settings)
    torch.testing.assert_close((with_nan - with_nan[:, :1]), (expected - expected[:, :1]), rtol=0.0, atol=1e-5)


def test_a_group_stops_by_itself() -> None:
    quick, slow = draw(20, 4) / 10, 6 * draw(20, 4, seed=1)
    settings = {"temperature": 1.0, "tolerance": 1e-2, "iterations": 100}
    both = column_scales(torch.stack([quick, slow]), torch.ones(2, 20, dtype=torch.bool), **settings)
    for scales, logits in zip(both, (quick, slow), strict=True):
        alone = column_scales(logits[None], torch.ones(1, 20, dtype=torch.bool), **settings)[0]
        torch.testing.assert_close(scales, alone, rtol=1e-12, atol=1e-12)


def test_evaluation_asks_nobody_else() -> None:
    router = make_router(sinkhorn(2), 5)
    tokens = draw(9, 5)
    alone = [router(row[None], token_info(1, train=False)).expert_ids.tolist() for row in tokens]
    assert router(tokens, token_info(9, train=False)).expert_ids.view(9, 2).tolist() == alone


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aux_loss_coeff": 0.01}, r"--moe-aux-loss-coeff 0\.01 has no effect with the router sinkhorn"),
        ({"router_pre_softmax": True}, r"--moe-router-pre-softmax .* has no effect"),
        ({"router_options": {"iterations": "0"}}, r"iterations=0: expected an integer of at least 1"),
        ({"router_options": {"temperature": "0"}}, r"temperature=0: expected a number above 0"),
    ],
)
def test_what_has_no_effect_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_router(MoEConfig(num_experts=4, router_type="sinkhorn", **fields), 5)
