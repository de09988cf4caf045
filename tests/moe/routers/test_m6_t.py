"""M6-T: the worked token, loops over prototypes, Switch as the case of one prototype, and places of their own."""

import math

import pytest
import torch
from moe_rows import NOBODY, golden_router, make_router, pairs, token_info, weights_of
from router_checks import draw_tokens, objective

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.capacity import make_limit
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.routers.router import Router, Site

LOSSES = {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001}


def m6_t(experts: int, prototypes: int, **fields: object) -> MoEConfig:
    return MoEConfig(num_experts=experts, router_topk=prototypes, router_type="m6_t", **fields)  # type: ignore[arg-type]


def test_the_worked_token_comes_out() -> None:
    router, tokens = golden_router(m6_t(4, 2))
    plan = router(tokens[:1], token_info(1))
    # the two best of all would be experts 0 and 1
    assert plan.expert_ids.tolist() == [0, 2]
    assert plan.combine_weights.tolist() == pytest.approx([0.7311, 0.7311], abs=1e-4)


@pytest.mark.parametrize(("experts", "prototypes"), [(4, 2), (6, 3), (12, 4), (9, 3), (5, 1)])
def test_m6_t_equals_the_loop(experts: int, prototypes: int) -> None:
    router = make_router(m6_t(experts, prototypes, **LOSSES), 6)
    info = token_info(5, 3, padding=[(4, 0), (0, 2)])
    tokens = draw_tokens(info)
    plan = router(tokens, info)
    logits = (tokens @ router.get_parameter("weight").T).tolist()
    width, found = experts // prototypes, weights_of(plan)
    expected: dict[tuple[int, int], float] = {}
    fractions, means = torch.zeros(3, experts), torch.zeros(3, experts)
    z_loss = 0.0
    for token in (t for t in range(15) if not info.is_padding[t]):
        group = int(info.groups[token])
        for first in range(0, experts, width):
            part = logits[token][first : first + width]
            total = sum(math.exp(value) for value in part)
            best = max(range(width), key=lambda e: part[e])
            expected[token, first + best] = math.exp(part[best]) / total
            fractions[group, first + best] += 1 / int(info.group_tokens[group])
            means[group, first : first + width] += torch.tensor([math.exp(v) / total for v in part]) / int(
                info.group_tokens[group]
            )
            z_loss += math.log(total) ** 2
    assert found == pytest.approx(expected, rel=1e-12)
    balance = width * (fractions * means).sum().item()
    assert plan.aux_losses["load_balance_loss"].share.item() == pytest.approx(balance, rel=1e-5)
    assert plan.aux_losses["z_loss"].share.item() == pytest.approx(z_loss, rel=1e-12)
    assert {name: (loss.weight, loss.per) for name, loss in plan.aux_losses.items()} == {
        "load_balance_loss": (0.01, "group"),
        "z_loss": (0.001, "token"),
    }


def test_even_scores_have_a_balance_of_k_and_a_logarithm_for_each_prototype() -> None:
    router = make_router(m6_t(12, 3, **LOSSES), 6)
    info = token_info(8)
    plan = router(torch.zeros(8, 6, dtype=torch.float64), info)
    assert plan.aux_losses["load_balance_loss"].share.item() == pytest.approx(3.0)
    assert plan.aux_losses["z_loss"].share.item() / 8 == pytest.approx(3 * math.log(4) ** 2)
    assert plan.stats["entropy_sum"].item() / 8 == pytest.approx(3 * math.log(4))


def gradient(router: Router, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    found = router.get_parameter("weight").grad
    assert found is not None
    return found


def test_one_prototype_is_switch_without_jitter() -> None:
    router = make_router(m6_t(4, 1, **LOSSES), 6)
    switch = make_router(
        MoEConfig(num_experts=4, router_type="switch", router_options={"jitter_eps": "0"}, **LOSSES),  # type: ignore[arg-type]
        6,
    )
    switch.load_state_dict(router.state_dict())
    info = token_info(6, 3, padding=[(5, 1)])
    tokens = draw_tokens(info)
    mine, theirs = router(tokens, info), switch(tokens, info)
    assert weights_of(mine) == weights_of(theirs)
    assert mine.aux_losses.keys() == theirs.aux_losses.keys() == {"load_balance_loss", "z_loss"}
    for name, loss in theirs.aux_losses.items():
        assert mine.aux_losses[name].share.item() == loss.share.item()
    assert torch.equal(gradient(router, objective(mine)), gradient(switch, objective(theirs)))


def test_prototypes_do_not_compete_for_places() -> None:
    config = m6_t(4, 2, expert_capacity_factor=0.5)
    router = make_router(config, 4)
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(4))
    # all want experts 0 and 3; 0.5 · 8 / (4 / 2) = 2 places each
    tokens = torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 8, dtype=torch.float64)
    info = token_info(8)
    served = make_limit(config, router.choices(config), NOBODY)(router(tokens, info), info)
    assert pairs(served) == {(0, 0), (0, 3), (1, 0), (1, 3)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (m6_t(6, 4), r"--num-experts 6 does not fall into --moe-router-topk 4 .* multiple of 4, or 1, 2, 3 prototypes"),
        (m6_t(4, 4), r"--moe-router-topk 4 makes each of --num-experts 4 a prototype .* without a gradient"),
        (m6_t(4, 2, router_pre_softmax=True), r"--moe-router-pre-softmax .* no effect with the router m6_t"),
        (m6_t(4, 2, slot_priority="k_major"), r"k_major\"? has no effect with the router m6_t"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(config: MoEConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(config, 6, Site(NOBODY))
