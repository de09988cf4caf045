"""Switch: the winner's raw probability, and jitter that belongs to the token."""

from dataclasses import replace

import pytest
import torch
from moe_rows import GOLDEN_LOGITS, golden_router, make_router, rows_of, token_info, weights_of

from megatron_moe.config.moe import MoEConfig


def switch(**options: str) -> MoEConfig:
    return MoEConfig(num_experts=4, router_type="switch", aux_loss_coeff=0.01, router_options=options)


def test_the_worked_choices_and_losses_come_out() -> None:
    router, tokens = golden_router(switch(jitter_eps="0"))
    plan = router(tokens, token_info(6))
    assert plan.expert_ids.tolist() == [0, 0, 0, 1, 0, 3]
    assert plan.combine_weights.tolist() == pytest.approx([0.6439, 0.5198, 0.8858, 0.5793, 0.4007, 0.3096], abs=1e-4)
    assert plan.aux_losses["load_balance_loss"].share.item() == pytest.approx(1.5002, abs=1e-4)
    assert plan.aux_losses["load_balance_loss"].weight == 0.01


def test_the_router_learns_through_the_weight() -> None:
    router, tokens = golden_router(switch(jitter_eps="0"))
    plan = router(tokens, token_info(6))
    plan.combine_weights.sum().backward()
    grad = router.get_parameter("weight").grad
    # d p_0 / d z_e = p_0 (1[e = 0] - p_e), times the token
    scores = torch.tensor(GOLDEN_LOGITS).double().softmax(1)
    winner = torch.zeros_like(scores)
    for token, expert in enumerate([0, 0, 0, 1, 0, 3]):
        winner[token] = scores[token, expert] * (torch.eye(4)[expert] - scores[token])
    torch.testing.assert_close(grad, winner.T @ tokens)


def jittered(eps: float, info_seed: int = 1, layer: int = 3, train: bool = True) -> torch.Tensor:
    """What the router's input is multiplied by: logits of a unit weight on tokens of one."""
    config = MoEConfig(num_experts=40, router_type="switch", z_loss_coeff=0.1, router_options={"jitter_eps": str(eps)})
    router = make_router(config, 40)
    info = token_info(30, 2, seed=info_seed, train=train)
    info = replace(info, random=info.random.at(layer=layer))
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(40))
        for feature in range(40):
            # the winner's log probability tells the logit of the one feature that is not zero
            tokens = torch.zeros(60, 40, dtype=torch.float64)
            tokens[:, feature] = 1.0
            chance = router(tokens, info).combine_weights
            seen.append((39 * chance / (1 - chance)).log())
    return torch.stack(seen, dim=1)


def test_jitter_multiplies_each_feature_of_each_token_within_its_bounds() -> None:
    factors = jittered(0.1)
    assert ((factors > 0.9) & (factors < 1.1)).all()
    assert factors.mean().item() == pytest.approx(1.0, abs=5e-3)
    assert factors.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    # no two tokens and no two features share their draws
    assert factors.unique().numel() > 0.95 * factors.numel()
    correlation = torch.corrcoef(torch.cat([factors, factors.T[:, :40]])) - torch.eye(100)
    assert correlation.abs().max() < 0.7
    torch.testing.assert_close(jittered(0.1), factors)
    assert not torch.allclose(jittered(0.1, info_seed=2), factors, atol=1e-3)
    assert not torch.allclose(jittered(0.1, layer=4), factors, atol=1e-3)


def test_jitter_is_for_training_only_and_can_be_turned_off() -> None:
    one = torch.ones(60, 40, dtype=torch.float64)
    torch.testing.assert_close(jittered(0.1, train=False), one)
    torch.testing.assert_close(jittered(0.0), one)


def test_jitter_follows_the_token_to_whichever_rank_holds_it() -> None:
    router = make_router(switch(jitter_eps="0.3"), 5)
    info = token_info(6, 2)
    tokens = torch.randn(12, 5, dtype=torch.float64)
    rows = torch.randperm(12)[:7]
    whole = weights_of(router(tokens, info))
    part = weights_of(router(tokens[rows], rows_of(info, rows)), rows)
    assert part == pytest.approx({pair: whole[pair] for pair in part}, rel=1e-12)
    assert whole != pytest.approx(weights_of(router(tokens, replace(info, train=False))), rel=1e-3)
