"""Top-k: worked numbers, a loop over tokens, and ties."""

import math

import pytest
import torch
from moe_rows import GOLDEN_LOGITS, golden_router, make_router, token_info, weights_of

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.routers.top_k import best_experts

PAIRS = [(0.7311, 0.2689), (0.7311, 0.2689), (0.9427, 0.0573), (0.7311, 0.2689), (0.5250, 0.4750), (0.5498, 0.4502)]


def slow_top_k(
    logits: list[float], k: int, *, pre_softmax: bool, renormalise: bool, factor: float
) -> list[tuple[int, float]]:
    """(expert, weight), best first."""
    chosen = sorted(range(len(logits)), key=lambda expert: (-logits[expert], expert))[:k]
    if pre_softmax:
        total = sum(math.exp(value) for value in logits)
        weights = [math.exp(logits[expert]) / total for expert in chosen]
        if renormalise:
            weights = [weight / sum(weights) for weight in weights]
    else:
        total = sum(math.exp(logits[expert]) for expert in chosen)
        weights = [math.exp(logits[expert]) / total for expert in chosen]
    return [(expert, factor * weight) for expert, weight in zip(chosen, weights, strict=True)]


def test_the_worked_pairs_come_out() -> None:
    router, tokens = golden_router(MoEConfig(num_experts=4, aux_loss_coeff=0.01, z_loss_coeff=0.001))
    plan = router(tokens, token_info(6))
    assert plan.expert_ids.view(6, 2).tolist() == [[0, 1], [0, 1], [0, 1], [1, 2], [0, 1], [3, 0]]
    torch.testing.assert_close(plan.combine_weights.view(6, 2), torch.tensor(PAIRS).double(), atol=1e-4, rtol=0)
    assert plan.aux_losses["load_balance_loss"].share.item() == pytest.approx(1.3189, abs=1e-4)
    assert plan.aux_losses["z_loss"].share.item() / 6 == pytest.approx(5.4931, abs=1e-4)
    assert plan.priority is None


@pytest.mark.parametrize(("convention", "value"), [("first_choice", 1.5002), ("all_choices", 2.6379)])
def test_the_balance_convention_is_an_option(convention: str, value: float) -> None:
    config = MoEConfig(num_experts=4, aux_loss_coeff=0.01, router_options={"balance": convention})
    router, tokens = golden_router(config)
    assert router(tokens, token_info(6)).aux_losses["load_balance_loss"].share.item() == pytest.approx(value, abs=1e-4)


def test_renormalised_softmax_before_the_choice_is_softmax_after_it() -> None:
    after, tokens = golden_router(MoEConfig(num_experts=4))
    before, _ = golden_router(MoEConfig(num_experts=4, router_pre_softmax=True, router_options={"renormalise": "true"}))
    info = token_info(6)
    assert weights_of(after(tokens, info)) == weights_of(before(tokens, info))


def test_one_raw_choice_is_switch() -> None:
    config = MoEConfig(num_experts=4, router_topk=1, router_pre_softmax=True)
    router, tokens = golden_router(config)
    switch, _ = golden_router(MoEConfig(num_experts=4, router_type="switch"))
    info = token_info(6, train=False)
    assert weights_of(router(tokens, info)) == weights_of(switch(tokens, info))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("pre_softmax", "renormalise"), [(False, None), (False, True), (True, None), (True, False), (True, True)]
)
@pytest.mark.parametrize(("experts", "choices", "factor"), [(4, 2, 1.0), (7, 3, 2.5), (3, 3, 1.0)])
def test_top_k_equals_the_loop(
    dtype: torch.dtype, pre_softmax: bool, renormalise: bool | None, experts: int, choices: int, factor: float
) -> None:
    options = {"topk_scaling_factor": str(factor), "renormalise": str(renormalise).lower()}
    config = MoEConfig(num_experts=experts, router_topk=choices, router_pre_softmax=pre_softmax, router_options=options)
    router = make_router(config, 5, dtype=dtype)
    info = token_info(6, 2, padding=[(5, 0)])
    tokens = torch.randn(12, 5, dtype=dtype)
    plan = router(tokens, info)
    assert plan.combine_weights.dtype == dtype
    logits = (tokens @ router.get_parameter("weight").T).tolist()
    for token in range(12):
        expected = slow_top_k(
            logits[token], choices, pre_softmax=pre_softmax, renormalise=bool(renormalise), factor=factor
        )
        found = [weights_of(plan).get((token, expert)) for expert, _ in expected]
        if info.is_padding[token]:
            assert found == [None] * choices
        else:
            rounding = 1e-12 if dtype == torch.float64 else 1e-5
            assert found == pytest.approx([weight for _, weight in expected], rel=rounding)
            assert plan.expert_ids.view(12, choices)[token].tolist() == [expert for expert, _ in expected]


def test_ties_go_to_the_lowest_expert() -> None:
    assert best_experts(torch.zeros(2, 9), 3).tolist() == [[0, 1, 2]] * 2
    assert best_experts(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]]), 4).tolist() == [[1, 3, 2, 4]]


def test_best_experts_are_those_of_a_stable_sort() -> None:
    logits = torch.randint(-3, 4, (200, 12)).float()
    assert torch.equal(best_experts(logits, 12), logits.sort(dim=1, descending=True, stable=True).indices)


def test_second_choices_wait_when_the_config_says_k_major() -> None:
    router, tokens = golden_router(MoEConfig(num_experts=4, slot_priority="k_major"))
    plan = router(tokens, token_info(6))
    assert plan.priority is not None and plan.priority.tolist() == [0, 1] * 6


def test_statistics_are_the_entropy_and_the_confidence_of_all_scores() -> None:
    router, tokens = golden_router(MoEConfig(num_experts=4))
    stats = router(tokens, token_info(6)).stats
    scores = torch.tensor(GOLDEN_LOGITS).double().softmax(1)
    assert stats["confidence_sum"].item() == pytest.approx(scores.max(1).values.sum().item())
    assert stats["entropy_sum"].item() == pytest.approx(-(scores * scores.log()).sum().item())
