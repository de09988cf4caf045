"""The whole registry: what every router guarantees, its declared causality, and equality on every split of a group."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_rows import NOBODY, make_router, rows_of, token_info, tp_state, weights_of
from ranks import run_on_ranks
from router_checks import (
    HIDDEN,
    check_edges,
    check_gradient,
    check_router,
    draw_tokens,
    group_samples,
    informed,
    leaks,
    objective,
)
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.capacity import limit_is_causal, make_limit
from megatron_moe.moe.methods import build_router, find_method
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.registry import ROUTERS
from megatron_moe.moe.routers.router import Router, Site
from megatron_moe.parallel.state import Axis

# one line for each way of routing that is worth its own run; every registered router is among them
CASES: list[dict[str, Any]] = [
    {"router_type": "top_k", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
    {"router_type": "top_k", "router_pre_softmax": True, "router_topk": 3, "expert_capacity_factor": 0.7},
    {"router_type": "top_k", "router_pre_softmax": True, "router_options": {"renormalise": "true"}},
    {"router_type": "switch", "aux_loss_coeff": 0.01, "expert_capacity_factor": 0.8, "router_topk": 1},
    {"router_type": "gshard", "aux_loss_coeff": 0.01, "expert_capacity_factor": 0.6},
    {"router_type": "gshard", "slot_priority": "k_major", "expert_capacity_factor": 0.6},
    {"router_type": "gshard", "router_options": {"second_policy": "sampling", "renormalise": "none"}},
    {"router_type": "st_moe", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001, "router_topk": 3},
    {"router_type": "st_moe", "expert_capacity_factor": 0.6, "token_drop_policy": "probs"},
    {"router_type": "noisy_top_k", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
    {
        "router_type": "noisy_top_k",
        "router_topk": 1,
        "router_pre_softmax": True,
        "expert_capacity_factor": 0.7,
        "token_drop_policy": "bpr",
        "router_options": {"noise": "fixed", "noise_std": "2", "load_coeff": "0.3"},
    },
    {"router_type": "noisy_top_k", "router_topk": 3, "router_options": {"importance_coeff": "0"}},
    {"router_type": "m6_t", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
    {"router_type": "m6_t", "router_topk": 1, "aux_loss_coeff": 0.01, "expert_capacity_factor": 0.7},
    {"router_type": "remoe", "router_options": {"first_coeff": "0.3"}},
    {
        "router_type": "remoe",
        "expert_capacity_factor": 0.7,
        "token_drop_policy": "probs",
        "router_options": {"first_coeff": "0.3"},
    },
    {"router_type": "sam", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001, "router_options": {"groups": "2"}},
    {
        "router_type": "sam",
        "expert_capacity_factor": 0.7,
        "router_options": {"groups": "2", "bias": "true", "renormalise": "true", "align_coeff": "0.5"},
    },
    {
        "router_type": "sam",
        "router_topk": 1,
        "aux_loss_coeff": 0.01,
        "z_loss_coeff": 0.001,
        "expert_capacity_factor": 0.7,
        "token_drop_policy": "probs",
        "router_options": {"groups": "2", "mode": "hierarchical", "expert_balance_coeff": "0.3"},
    },
    {"router_type": "deepseek", "aux_loss_coeff": 0.003, "z_loss_coeff": 0.001, "router_topk": 3},
    {
        "router_type": "deepseek",
        "aux_loss_coeff": 0.003,
        "expert_capacity_factor": 0.8,
        "token_drop_policy": "probs",
        "router_options": {
            "num_groups": "2",
            "topk_groups": "1",
            "device_loss_coeff": "0.05",
            "communication_loss_coeff": "0.02",
        },
    },
    {"router_type": "deepseek_v3", "z_loss_coeff": 0.001, "router_options": {"sequence_loss_coeff": "0.1"}},
    {"router_type": "deepseek_v3", "router_options": {"num_groups": "2", "topk_groups": "1"}},
    {"router_type": "deepseek_v3", "router_topk": 3, "router_options": {"balance": "quantile"}},
    {"router_type": "hash", "expert_capacity_factor": 0.7},
    {"router_type": "hash", "router_topk": 1, "router_options": {"table": "mod"}},
    {"router_type": "hash", "router_options": {"table": "previous"}},
    {"router_type": "rand_hash", "router_topk": 3, "expert_capacity_factor": 0.7},
    {"router_type": "rand_hash", "slot_priority": "k_major", "expert_capacity_factor": 0.6},
    {"router_type": "avg_k"},
    {"router_type": "avg_k", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
    {"router_type": "avg_k", "router_topk": 3, "router_options": {"gate_weight": "sigmoid"}},
    {
        "router_type": "avg_k",
        "aux_loss_coeff": 0.01,
        "expert_capacity_factor": 0.7,
        "token_drop_policy": "bpr",
        "router_options": {"gate_weight": "softmax", "key_source": "live"},
    },
    {"router_type": "thor"},
    {"router_type": "thor", "routing_group_samples": 3, "router_options": {"granularity": "group"}},
    {"router_type": "thor", "router_options": {"granularity": "sequence", "inference": "ensemble"}},
    {"router_type": "thor", "router_options": {"granularity": "token", "inference": "token"}},
    {"router_type": "expert_choice", "z_loss_coeff": 0.001},
    {"router_type": "mixture_of_depths", "num_experts": 1, "router_topk": 1, "router_options": {"capacity": "0.3"}},
    {"router_type": "base", "z_loss_coeff": 0.001},
    {"router_type": "sinkhorn", "z_loss_coeff": 0.001, "expert_capacity_factor": 0.7},
    {"router_type": "sinkhorn", "router_topk": 1, "router_options": {"temperature": "0.3", "tolerance": "0"}},
    {"router_type": "expert_choice", "router_options": {"capacity": "1.3", "rounding": "round"}},
    {"router_type": "expert_choice_position", "routing_group_samples": 2, "z_loss_coeff": 0.001},
    {"router_type": "expert_choice_position", "routing_group_samples": 3, "router_options": {"capacity": "1.3"}},
    {"router_type": "expert_choice_threshold", "z_loss_coeff": 0.001},
    {
        "router_type": "expert_choice_threshold",
        "expert_capacity_factor": 0.7,
        "token_drop_policy": "probs",
        "router_options": {"capacity": "1.3"},
    },
    {"router_type": "ec_cap", "z_loss_coeff": 0.001},
    {
        "router_type": "ec_cap",
        "router_options": {"capacity": "1.6", "cap": "2", "strict_cap": "true", "entropy": "0.02", "rounding": "round"},
    },
]
HELD_STILL = ("align_coeff",)
each_case = pytest.mark.parametrize("fields", CASES, ids=lambda fields: f"{fields['router_type']}{CASES.index(fields)}")


def config_of(fields: dict[str, Any]) -> MoEConfig:
    return MoEConfig(**{"num_experts": 4, **fields})


def decide(router: Router, config: MoEConfig, axis: Axis, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
    info = informed(router, info) if info.expert_keys is None else info
    return make_limit(config, router.choices(config), axis, router.expert_pools)(router(tokens, info), info)


def test_every_registered_router_is_checked() -> None:
    assert {fields["router_type"] for fields in CASES} == set(ROUTERS)


@each_case
def test_router_keeps_what_all_routers_promise(fields: dict[str, Any]) -> None:
    check_router(config_of(fields))


@each_case
def test_gradients_are_those_of_finite_differences(fields: dict[str, Any]) -> None:
    # a loss that holds a part of itself still is no function that finite differences know: see its router's own test
    options = {name: text for name, text in fields.get("router_options", {}).items() if name not in HELD_STILL}
    check_gradient(config_of({**fields, "router_options": options}))


@each_case
def test_odd_inputs_get_a_plan_too(fields: dict[str, Any]) -> None:
    check_edges(make_router(config_of(fields), HIDDEN))


@each_case
def test_router_and_limit_see_the_future_exactly_when_they_say_so(fields: dict[str, Any]) -> None:
    config = config_of(fields)
    router = make_router(config, HIDDEN)
    causal = router.is_causal and limit_is_causal(config, router.choices(config))
    samples = group_samples(config, 2)
    assert leaks(lambda tokens, info: decide(router, config, NOBODY, tokens, info), samples) is not causal
    assert leaks(lambda tokens, info: router(tokens, informed(router, info)), samples) is not router.is_causal


@each_case
def test_evaluation_repeats_itself_whatever_the_seed(fields: dict[str, Any]) -> None:
    router = make_router(config_of(fields), HIDDEN)
    samples = group_samples(router.config, 1)
    first, other = (token_info(8, 2, group_samples=samples, train=False, seed=seed) for seed in (1, 2))
    tokens = draw_tokens(first)
    plan = router(tokens, informed(router, first))
    assert weights_of(plan) == weights_of(router(tokens, informed(router, other)))
    assert not plan.aux_losses


def test_bfloat16_tokens_are_routed_in_float32() -> None:
    # one logit of 128.5 among ten of 128: bfloat16 logits would make all the same  [ST-MoE, footnote 7]
    config = MoEConfig(num_experts=11, router_type="switch", router_options={"jitter_eps": "0"})
    router = make_router(config, 1, dtype=torch.float32)
    with torch.no_grad():
        router.get_parameter("weight").fill_(128.0)[10] = 128.5
    plan = router(torch.ones(3, 1, dtype=torch.bfloat16), token_info(3))
    assert plan.combine_weights.dtype == torch.float32
    assert plan.expert_ids.tolist() == [10, 10, 10]
    assert plan.combine_weights.tolist() == pytest.approx([0.1415] * 3, abs=1e-4)


SPLIT = 24


def split_info(config: MoEConfig) -> TokenInfo:
    # groups of three samples and one of a single sample, as at the end of a data set
    return token_info(6, 4, group_samples=group_samples(config, 3), padding=[(5, 0), (5, 3), (4, 3), (0, 1)])


def gradient_of(loss: Tensor, leaves: list[Tensor]) -> Tensor:
    """All of them in one row; zeros where nothing is learned, as with constant weights."""
    if loss.requires_grad:
        loss.backward()
    found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(grad.flatten() for grad in found)])


def learned(router: Router, info: TokenInfo) -> list[Tensor]:
    """The router's parameters, and the experts' keys if it reads them."""
    keys = [] if info.expert_keys is None else [info.expert_keys]
    return [*(parameter for _, parameter in sorted(router.named_parameters())), *keys]


def routed_on_rank(rank: int, world_size: int) -> list[tuple[dict[Any, float], dict[str, float], list[Any], list[Any]]]:
    """For each case: served weights, loss shares, gradient of the router, gradient of the tokens of this rank."""
    axis = tp_state(rank, world_size).tp_cp
    # uneven, out of order, and nothing at all for rank 1
    rows = (torch.tensor([0, 2, 2, 3, 0, 2])[torch.arange(SPLIT) % 6] == rank).nonzero()[:, 0].flip(0)
    answers = []
    for fields in CASES:
        config = config_of(fields)
        info = split_info(config)
        tokens = draw_tokens(info)
        router = make_router(config, HIDDEN, axis=axis)
        mine = tokens[rows].requires_grad_()
        here = informed(router, rows_of(info, rows))
        plan = decide(router, config, axis, mine, here)
        grad = gradient_of(objective(plan, rows), learned(router, here))
        shares = {name: loss.share.item() for name, loss in plan.aux_losses.items()}
        token_grad = torch.zeros_like(mine) if mine.grad is None else mine.grad
        token_grads = list(zip(rows.tolist(), token_grad.tolist(), strict=True))
        answers.append((weights_of(plan, rows), shares, grad.tolist(), token_grads))
    return answers


def test_every_split_of_a_group_gives_the_same_plan_losses_and_gradients() -> None:
    answers = run_on_ranks(4, routed_on_rank)
    for case, fields in enumerate(CASES):
        config = config_of(fields)
        info = split_info(config)
        router = make_router(config, HIDDEN)
        tokens = draw_tokens(info).requires_grad_()
        known = informed(router, info)
        plan = decide(router, config, NOBODY, tokens, known)
        wanted = gradient_of(objective(plan), learned(router, known))
        weights: dict[Any, float] = {}
        token_grad = torch.zeros_like(tokens)
        for served, *_, grads in (answer[case] for answer in answers):
            weights |= served
            for row, grad in grads:
                token_grad[row] = torch.tensor(grad, dtype=torch.float64)
        assert weights == pytest.approx(weights_of(plan), rel=1e-12), fields
        for name, loss in plan.aux_losses.items():
            assert sum(answer[case][1][name] for answer in answers) == pytest.approx(loss.share.item(), rel=1e-12)
        grad = torch.tensor([answer[case][2] for answer in answers], dtype=torch.float64).sum(dim=0)
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-13)
        wanted_grad = torch.zeros_like(tokens) if tokens.grad is None else tokens.grad
        torch.testing.assert_close(token_grad, wanted_grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_type": "topk"}, r"no such router; did you mean 'top_k'\? Use one of top_k, .*switch"),
        ({"router_type": "zzz"}, r"no such router\. Use one of"),
        ({"router_options": {"renormalize": "true"}}, r"top_k has no such option; did you mean 'renormalise'\?"),
        ({"router_options": {"zzz": "1"}}, r"no such option\. It knows renormalise, balance, topk_scaling_factor\."),
        ({"router_options": {"renormalise": "2"}}, r"renormalise=2: expected true or false, or none\."),
        ({"router_options": {"topk_scaling_factor": "much"}}, r"factor=much: expected a number above 0\."),
        ({"router_options": {"topk_scaling_factor": "0"}}, r"expected a number above 0\."),
        ({"router_options": {"balance": "first"}}, r"=first: expected first_choice, all_choices or normalised\."),
        ({"router_options": {"renormalise": "false"}}, r"add --moe-router-pre-softmax"),
        ({"router_topk": 1}, r"--moe-router-topk 1 .* without a gradient"),
        ({"router_topk": 1, "router_pre_softmax": True, "router_options": {"renormalise": "true"}}, r"a gradient"),
        ({"router_topk": 1, "router_type": "st_moe"}, r"without a gradient"),
        ({"router_topk": 3, "router_type": "switch"}, r"--moe-router-topk 3 has no effect with the router switch"),
        ({"router_topk": 1, "router_type": "gshard"}, r"--moe-router-topk 1 has no effect with the router gshard"),
        ({"aux_loss_coeff": 0.1, "router_type": "expert_choice"}, r"--moe-aux-loss-coeff 0.1 has no effect"),
        ({"router_options": {"capacity": "5"}, "router_type": "expert_choice"}, r"more experts per token"),
        ({"router_type": "nowhere/my_router.py:Mine"}, r"there is no file .*nowhere/my_router\.py"),
    ],
)
def test_wrong_configuration_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(config_of(fields), HIDDEN, Site(NOBODY))


def test_what_says_the_same_as_the_router_is_accepted() -> None:
    for fields in ({"router_type": "switch", "router_topk": 1}, {"router_type": "gshard", "router_topk": 2}):
        build_router(config_of(fields), HIDDEN, Site(NOBODY))
    config = config_of({"router_topk": 1, "router_pre_softmax": True})
    assert find_method("top_k").choices(config) == 1
    build_router(config, HIDDEN, Site(NOBODY))


def test_every_option_has_a_help_text_and_every_router_a_source() -> None:
    for name, router in ROUTERS.items():
        assert all(field.metadata["option"].help for field in dataclasses.fields(router.Options)), name
        module = inspect.getmodule(router)
        assert module is not None and "arXiv:" in (module.__doc__ or ""), name


OUTSIDE = '''
from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_moe.config.options import option
from megatron_moe.moe.plan import plan_from_choices
from megatron_moe.moe.routers.router import Router


@dataclass(frozen=True, kw_only=True)
class Options:
    offset: int = option(0, "where to begin", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Bare:
    offset: int = 0


class RoundRobin(Router):
    """Token by token to the next expert."""

    Options = Options
    is_causal = True

    def setup(self):
        self.scale = self.new_weight((self.hidden_size,), self.init_std)

    @classmethod
    def choices(cls, config):
        return 1

    def forward(self, tokens, info):
        experts = ((info.positions + self.options.offset) % self.config.num_experts)[:, None]
        weights = (tokens.to(self.dtype) @ self.scale).sigmoid()[:, None]
        return plan_from_choices(experts, weights, info, num_experts=self.config.num_experts)


class Undeclared(RoundRobin):
    Options = Bare
'''


def test_a_router_from_outside_the_package_runs_like_one_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "my_router.py"
    file.write_text(OUTSIDE)
    config = config_of({"router_type": f"{file}:RoundRobin", "router_options": {"offset": "1"}})
    check_router(config)
    info = token_info(4)
    assert make_router(config, HIDDEN)(draw_tokens(info), info).expert_ids.tolist() == [1, 2, 3, 0]
    # each layer gets the same class
    assert find_method(config.router_type) is find_method(config.router_type)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (OUTSIDE, "Options", "Options is not a Router of that file; it has RoundRobin, Undeclared."),
        (OUTSIDE, "Undeclared", "Bare.offset has no help text"),
        ("raise ValueError('broken')", "Mine", "fails with ValueError: broken"),
        ("", "Mine", "it has none"),
    ],
)
def test_a_router_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str, name: str, message: str) -> None:
    file = tmp_path / "my_router.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        build_router(config_of({"router_type": f"{file}:{name}"}), HIDDEN, Site(NOBODY))


def test_a_file_of_another_kind_is_no_router(tmp_path: Path) -> None:
    file = tmp_path / "my_router.txt"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"must end in \.py"):
        find_method(f"{file}:Mine")
