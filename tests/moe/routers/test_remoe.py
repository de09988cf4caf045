"""ReMoE: the worked tokens, the coefficient's way, and that it is one number for the whole model on every layout."""

from typing import Any

import pytest
import torch
from moe_rows import NOBODY, make_router, token_info, weights_of
from ranks import run_on_ranks
from router_checks import draw_tokens
from torch import Tensor

from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.certify.tiny_run import outcome_of, run_all
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.plan import RoutingReport
from megatron_moe.moe.routers.remoe import ReMoERouter
from megatron_moe.moe.routers.router import Site

WORKED = [[0.42, -0.46, 0.05, 0.01], [-0.75, 0.81, -0.59, -0.40], [0.2, 0.1, -0.3, -0.2]]


def remoe(choices: int = 1, experts: int = 4, **options: str) -> MoEConfig:
    return MoEConfig(num_experts=experts, router_topk=choices, router_type="remoe", router_options=options)


def remoe_router(config: MoEConfig, hidden: int = 6) -> ReMoERouter:
    router = make_router(config, hidden)
    assert isinstance(router, ReMoERouter)
    return router


def worked_router() -> tuple[ReMoERouter, Tensor]:
    router = remoe_router(remoe(), 4)
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(4))
    return router, torch.tensor(WORKED, dtype=torch.float64)


def step(router: ReMoERouter, requested: int, tokens: int) -> float:
    """The coefficient after a step in which so many of the model's tokens asked for so many experts."""
    own = {"requested": torch.tensor([1.0, 0.0]).double(), "tokens": torch.tensor(99.0).double()}
    model = {"requested": torch.tensor([1.0, requested - 1.0]).double(), "tokens": torch.tensor(tokens).double()}
    router.after_step(own, model)
    return router.coefficient.item()


def test_the_worked_tokens_come_out() -> None:
    router, tokens = worked_router()
    plan = router(tokens, token_info(3))
    assert weights_of(plan) == {(0, 0): 0.42, (0, 2): 0.05, (0, 3): 0.01, (1, 1): 0.81, (2, 0): 0.2, (2, 1): 0.1}
    assert plan.mask().sum(dim=1).tolist() == [3, 1, 2]
    assert len(plan.token_ids) == 12
    loss = plan.aux_losses["relu_regulariser"]
    assert loss.share.item() == pytest.approx(1.3867, abs=1e-4)
    assert loss.per == "group"
    # without the load it would be the sum of mean weights, .53; half of the outputs are zero, and 3/4 ought to be
    assert plan.combine_weights.sum().item() / 3 == pytest.approx(0.53)
    assert step(router, int(plan.mask().sum()), 3) == pytest.approx(1.2e-8, rel=1e-12)


def test_the_regulariser_weighs_each_expert_by_its_load_in_the_routing_group() -> None:
    router = remoe_router(remoe(2))
    info = token_info(5, 5, group_samples=2, padding=[(4, 0), (0, 3), *((p, 4) for p in range(5))])
    tokens = draw_tokens(info)
    plan = router(tokens, info)
    gates = (tokens @ router.get_parameter("weight").T).tolist()
    expected = 0.0
    for group in range(2):
        rows = [t for t in range(25) if info.groups[t] == group and not info.is_padding[t]]
        for expert in range(4):
            active = [gates[t][expert] for t in rows if gates[t][expert] > 0]
            expected += 4 / (2 * len(rows)) * len(active) * sum(active) / len(rows)
    assert plan.aux_losses["relu_regulariser"].share.item() == pytest.approx(expected, rel=1e-12)


def test_positive_logits_everywhere_are_a_dense_weighted_sum() -> None:
    router, tokens = worked_router()
    plan = router(tokens.abs(), token_info(3, train=False))
    table = {(token, expert): abs(value) for token, row in enumerate(WORKED) for expert, value in enumerate(row)}
    assert weights_of(plan) == table
    plan.combine_weights.sum().backward()
    torch.testing.assert_close(router.get_parameter("weight").grad, tokens.abs().sum(dim=0).expand(4, 4))
    assert not plan.aux_losses


def test_a_token_that_no_expert_wants_is_served_by_none() -> None:
    router, tokens = worked_router()
    info = token_info(3)
    plan = router(torch.stack([tokens[0], -tokens[1].abs(), 0 * tokens[2]]), info)
    assert {token for token, _ in weights_of(plan)} == {0}
    assert RoutingReport.of(0, plan, plan, info).stats["tokens_unserved"].item() == 2


def test_the_coefficient_rises_while_too_many_experts_are_active() -> None:
    router = remoe_router(remoe(2, first_coeff="0.5", coeff_factor="1.5"))
    assert router.coefficient.item() == 0.5
    assert step(router, requested=21, tokens=10) == 0.75
    assert step(router, requested=20, tokens=10) == 0.75
    assert step(router, requested=19, tokens=10) == pytest.approx(0.5)
    assert step(router, requested=0, tokens=0) == pytest.approx(0.5)
    info = token_info(3)
    loss = router(draw_tokens(info), info).aux_losses["relu_regulariser"]
    assert isinstance(loss.weight, Tensor) and loss.weight.item() == router.coefficient.item()
    assert not loss.weight.requires_grad


def test_exactly_k_experts_on_average_leave_the_coefficient_alone() -> None:
    # 1 - k/E and the share of zeros are equal here, but rarely after rounding
    for experts in (3, 7, 11, 49):
        for choices in range(1, experts):
            router = remoe_router(remoe(choices, experts))
            assert step(router, requested=choices * 1013, tokens=1013) == 1e-8


def test_a_coefficient_never_leaves_what_a_float_can_hold() -> None:
    router = make_router(remoe(coeff_factor="1e30"), 6, dtype=torch.float32)
    assert isinstance(router, ReMoERouter)
    for requested in (0, 9):
        for _ in range(4):
            step(router, requested, 3)
        assert router.coefficient.isfinite() and router.coefficient > 0
    assert router.coefficient > 1e30


def test_the_coefficient_is_saved_with_the_weights() -> None:
    router, other = remoe_router(remoe()), remoe_router(remoe(first_coeff="0.25"))
    router.load_state_dict(other.state_dict())
    assert router.coefficient.item() == 0.25


def test_the_coefficient_brings_the_experts_per_token_to_k() -> None:
    router = remoe_router(remoe(2, 8))
    info = token_info(64)
    tokens = draw_tokens(info)
    tokens[:, 0] = 1.0  # something to push all logits down by: there is no bias
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05)
    active = []
    for _ in range(300):
        plan = router(tokens, info)
        loss = plan.aux_losses["relu_regulariser"]
        # what stands for the model's loss wants weights of 0.3, from all experts
        task = (plan.combine_weights - 0.3).square().sum() / 64
        optimizer.zero_grad()
        (task + loss.share * loss.weight).backward()
        optimizer.step()
        asked = plan.tokens_per_expert().double()
        router.after_step({}, {"requested": asked, "tokens": torch.tensor(64.0).double()})
        active.append(asked.sum().item() / 64)
    assert min(active[:50]) > 3
    assert sum(active[-100:]) / 100 == pytest.approx(2, rel=0.05)
    assert 0.01 < router.coefficient < 10


def coefficients(world_size: int, parallel: dict[str, Any], micro_batch: int) -> list[float]:
    """Each sparse layer's coefficient after three steps of a tiny model."""
    moe = {"router_type": "remoe", "router_topk": 1, "router_options": {"first_coeff": "0.01"}}
    config = tiny_config(moe, parallel, {}, micro_batch)
    weights = outcome_of([ranks[0] for ranks in run_on_ranks(world_size, run_all, [config])]).weights
    return [value.item() for name, value in sorted(weights.items()) if name.endswith("coefficient")]


def test_all_layers_and_ranks_follow_the_same_count() -> None:
    # more than one of four experts is active at first, in every step
    wanted = [pytest.approx(0.01 * 1.2**3, rel=1e-12)] * 2
    assert coefficients(1, {}, 1) == wanted
    assert coefficients(1, {}, 4) == wanted
    assert coefficients(2, {}, 1) == wanted
    assert coefficients(2, {"tensor_model_parallel_size": 2}, 2) == wanted
    assert coefficients(2, {"pipeline_model_parallel_size": 2}, 1) == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aux_loss_coeff": 0.01}, r"--moe-aux-loss-coeff 0.01 has no effect with the router remoe"),
        ({"z_loss_coeff": 0.01}, r"--moe-z-loss-coeff 0.01 has no effect"),
        ({"slot_priority": "k_major"}, r"k_major\"? has no effect"),
        ({"router_pre_softmax": True}, r"--moe-router-pre-softmax .* no effect"),
        ({"router_options": {"first_coeff": "0"}}, r"first_coeff=0: expected a number above 0"),
        ({"router_options": {"coeff_factor": "1"}}, r"coeff_factor=1: expected a number above 1"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(MoEConfig(num_experts=4, router_type="remoe", **fields), 6, Site(NOBODY))
