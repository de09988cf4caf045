"""Expert choice with a cap: worked numbers, equivalences, small groups, refusals."""

from typing import Any

import pytest
import torch
from moe_rows import golden_router, make_router, pairs, token_info, weights_of
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig


def draw(tokens: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64)


def ec_cap(experts: int = 4, **options: str) -> MoEConfig:
    return MoEConfig(num_experts=experts, router_type="ec_cap", router_options=options)


@pytest.mark.parametrize("strict", ["false", "true"])
def test_the_worked_choices_come_out(strict: str) -> None:
    router, tokens = golden_router(ec_cap(capacity="1.4", strict_cap=strict))
    plan = router(tokens, token_info(6))
    assert pairs(plan) == {(0, 0), (2, 0), (3, 1), (4, 1), (3, 2), (5, 2), (1, 3), (5, 3)}
    assert plan.mask().sum(dim=1).tolist() == [1, 1, 1, 2, 1, 2]
    assert plan.combine_weights.sum().item() == pytest.approx(3.3177, abs=1e-4)
    scores = tokens.softmax(dim=1)
    assert weights_of(plan) == pytest.approx({(t, e): scores[t, e].item() for t, e in pairs(plan)})


def test_a_cap_that_nobody_reaches_is_expert_choice() -> None:
    free, tokens = golden_router(
        MoEConfig(num_experts=4, router_type="expert_choice", router_options={"capacity": "1"})
    )
    capped, _ = golden_router(ec_cap(capacity="1", cap="3"))
    assert weights_of(capped(tokens, token_info(6))) == weights_of(free(tokens, token_info(6)))
    config = MoEConfig(num_experts=16, router_type="expert_choice", router_options={"capacity": "1.5"})
    info = token_info(32, 2, padding=[(31, 1)])
    tokens = draw(64, 5)
    expected = weights_of(make_router(config, 5)(tokens, info))
    most = max(sum(token == t for token, _ in expected) for t in range(64))
    found = make_router(ec_cap(16, capacity="1.5", cap=str(min(most + 6, 15))), 5)(tokens, info)
    assert weights_of(found) == expected


@pytest.mark.parametrize("strict", ["false", "true"])
def test_experts_are_full_and_tokens_are_within_their_cap(strict: str) -> None:
    info = token_info(64, 3, group_samples=2, padding=[(63, 0), (62, 0), (63, 2)])
    router = make_router(ec_cap(16, strict_cap=strict), 5)
    tokens = draw(192, 5)
    mask = router(tokens, info).mask()
    for group, takes in ((0, 126 * 2 // 16), (1, 63 * 2 // 16)):
        assert mask[info.groups == group].sum(dim=0).tolist() == [takes] * 16
    counts = mask.sum(dim=1)
    if strict == "true":
        assert counts.max() == 2
    else:
        assert counts.max() == 3
        assert (counts > 2).sum() < 0.05 * 192
    free = make_router(MoEConfig(num_experts=16, router_type="expert_choice"), 5)(tokens, info).mask().sum(dim=1)
    assert (free > 2).sum() > 0.05 * 192


def test_a_group_too_small_for_its_cap_gets_the_least_that_fits() -> None:
    # two tokens, four experts that take one each at least: two experts for each token; with one token all four
    router = make_router(ec_cap(cap="1", capacity="1", strict_cap="true"), 5)
    tokens = draw(4, 5)
    plan = router(tokens, token_info(2, 2, padding=[(1, 1)]))
    assert plan.mask().sum(dim=1).tolist() == [2, 4, 2, 0]
    assert plan.tokens_per_expert().tolist() == [2, 2, 2, 2]


def test_lambda_and_iterations_reach_the_solver() -> None:
    tokens = draw(96, 5)
    plans = [
        pairs(make_router(ec_cap(8, **options), 5)(tokens, token_info(96)))
        for options in ({}, {"iterations": "1"}, {"entropy": "0.1"})
    ]
    assert plans[0] != plans[1]
    assert plans[0] != plans[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_options": {"capacity": "2.5"}}, r"capacity=2\.5 .* than cap=2 allows; .* cap of at least 3"),
        ({"router_options": {"cap": "4"}}, r"cap=4 limits nothing with --num-experts 4; .* expert_choice"),
        ({"router_options": {"cap": "0"}}, r"cap=0: expected an integer of at least 1"),
        ({"router_options": {"entropy": "0"}}, r"entropy=0: expected a number above 0"),
        ({"aux_loss_coeff": 0.1}, r"--moe-aux-loss-coeff 0\.1 has no effect with the router ec_cap"),
        ({"router_topk": 1}, r"--moe-router-topk 1 has no effect with the router ec_cap"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_router(MoEConfig(num_experts=4, router_type="ec_cap", **fields), 5)
