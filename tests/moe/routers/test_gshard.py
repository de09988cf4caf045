"""GShard: the pair's weights, the second expert's luck, and the worked drops."""

from dataclasses import replace

import pytest
import torch
from moe_rows import GOLDEN_LOGITS, NOBODY, golden_router, pairs, token_info, weights_of

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.capacity import make_limit

PAIRS = [(0.7311, 0.2689), (0.7311, 0.2689), (0.9427, 0.0573), (0.7311, 0.2689), (0.5250, 0.4750), (0.5498, 0.4502)]
KEPT = [0.5379, 0.5379, 0.1146, 0.5379, 0.95, 0.9003]
CHOSEN = [[0, 1], [0, 1], [0, 1], [1, 2], [0, 1], [3, 0]]


def gshard(**options: str) -> MoEConfig:
    return MoEConfig(
        num_experts=4, router_type="gshard", slot_priority="k_major", aux_loss_coeff=0.01, router_options=options
    )


def test_the_worked_weights_come_out() -> None:
    router, tokens = golden_router(gshard(second_policy="all"))
    plan = router(tokens, token_info(6))
    assert plan.expert_ids.view(6, 2).tolist() == CHOSEN
    torch.testing.assert_close(plan.combine_weights.view(6, 2), torch.tensor(PAIRS).double(), atol=1e-4, rtol=0)
    assert plan.aux_losses["load_balance_loss"].share.item() == pytest.approx(1.5002, abs=1e-4)
    assert plan.priority is not None


def test_raw_weights_are_the_scores() -> None:
    router, tokens = golden_router(gshard(second_policy="all", renormalise="none"))
    plan = router(tokens, token_info(6))
    scores = torch.tensor(GOLDEN_LOGITS).double().softmax(1)
    torch.testing.assert_close(plan.combine_weights.view(6, 2), scores.gather(1, torch.tensor(CHOSEN)))


@pytest.mark.parametrize(("places", "second"), [(3, {(0, 1), (1, 1), (3, 2)}), (2, {(0, 1), (3, 2)})])
def test_the_worked_drops_come_out(places: int, second: set[tuple[int, int]]) -> None:
    config = replace(gshard(second_policy="all"), expert_capacity_factor=places / 3)
    router, tokens = golden_router(config)
    info = token_info(6)
    plan = make_limit(config, router.choices(config), NOBODY)(router(tokens, info), info)
    first = {(0, 0), (1, 0), (2, 0), (3, 1), (5, 3)} if places == 3 else {(0, 0), (1, 0), (3, 1), (5, 3)}
    assert pairs(plan) == first | second


def test_the_second_expert_is_kept_as_often_as_twice_its_weight() -> None:
    router, tokens = golden_router(gshard())
    repeats = 4000
    info = token_info(6, repeats)
    plan = router(tokens.repeat_interleave(repeats, dim=0), info)
    used = (plan.expert_ids.view(6, repeats, 2) < 4).double().mean(dim=1)
    assert used[:, 0].tolist() == [1.0] * 6
    assert used[:, 1].tolist() == pytest.approx(KEPT, abs=0.03)


def test_the_draw_is_the_tokens_own() -> None:
    router, tokens = golden_router(gshard())
    info = token_info(6)
    draws = info.random.at(stream="second_expert").uniform(info.global_keys)
    kept = (router(tokens, info).expert_ids.view(6, 2)[:, 1] < 4).tolist()
    assert kept == [2 * g2 > u for (_, g2), u in zip(PAIRS, draws.tolist(), strict=True)]
    later = replace(info, random=info.random.at(step=5))
    draws = later.random.at(stream="second_expert").uniform(info.global_keys)
    kept = (router(tokens, later).expert_ids.view(6, 2)[:, 1] < 4).tolist()
    assert kept == [2 * g2 > u for (_, g2), u in zip(PAIRS, draws.tolist(), strict=True)]


def test_sampling_draws_the_second_expert_in_proportion_to_its_score() -> None:
    router, tokens = golden_router(gshard(second_policy="sampling"))
    repeats = 4000
    plan = router(tokens.repeat_interleave(repeats, dim=0), token_info(6, repeats))
    chosen = plan.expert_ids.view(6, repeats, 2)
    scores = torch.tensor(GOLDEN_LOGITS).double().softmax(1)
    for token, (first, _) in enumerate(CHOSEN):
        assert (chosen[token, :, 0] == first).all()
        others = scores[token].clone()
        others[first] = 0.0
        frequency = chosen[token, :, 1].bincount(minlength=4) / repeats
        assert frequency.tolist() == pytest.approx((others / others.sum()).tolist(), abs=0.03)
    weights = plan.combine_weights.view(6, repeats, 2)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(6, repeats, dtype=torch.float64))
    pair = scores[0, 0] / (scores[0, 0] + scores[0][chosen[0, :, 1]])
    torch.testing.assert_close(weights[0, :, 0], pair)


@pytest.mark.parametrize("policy", ["random", "all", "sampling"])
def test_evaluation_uses_both_of_the_two_best(policy: str) -> None:
    router, tokens = golden_router(gshard(second_policy=policy))
    plan = router(tokens, token_info(6, train=False))
    assert plan.expert_ids.view(6, 2).tolist() == CHOSEN
    assert len(weights_of(plan)) == 12
