"""Avg-K: blocks chosen by their mean key, through the real layer; its learned control; gradients of the keys."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from layers.contexts import context, make
from moe_layers import ALONE, layer_of, run_layer
from moe_rows import NOBODY, make_router, token_info, weights_of
from ranks import run_on_ranks
from router_checks import informed
from torch import nn

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.layers.mlp import MLP
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.routers.router import Site
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.state import ParallelState

# four blocks of two cells for tokens of width two, worked out by hand
KEYS = [[[1.0, 0], [0, 1]], [[2, -1], [1, 1]], [[-1, 0], [0, -2]], [[0.5, 0.5], [1.5, -0.5]]]
VALUES = [[[1.0, 0], [0, 1]], [[1, 1], [0, 2]], [[1, 0], [1, 1]], [[2, 0], [0, 1]]]
MEANS = [[0.5, 0.5], [1.5, 0.0], [-0.5, -1.0], [1.0, 0.0]]
TOKEN = [1.0, 0.5]


def avg_k(num_experts: int = 4, choices: int = 2, *, aux_loss_coeff: float = 0.0, **options: str) -> MoEConfig:
    return MoEConfig(
        num_experts=num_experts,
        router_type="avg_k",
        router_topk=choices,
        router_options=options,
        aux_loss_coeff=aux_loss_coeff,
    )


def worked_layer(config: MoEConfig) -> MoELayer:
    layer = layer_of(make_router(config, 2), ffn_size=2, activation="relu")
    with torch.no_grad():
        layer.experts.w1.copy_(torch.tensor(KEYS)[:, None])
        layer.experts.w2.copy_(torch.tensor(VALUES).transpose(1, 2))
    return layer


@pytest.mark.parametrize(
    ("choices", "gate_weight", "answer"),
    [
        (2, "one", [3.0, 5.75]),
        (2, "softmax", [1.1151, 2.4332]),
        (4, "one", [4.0, 6.25]),
        # blocks 1 and 3 answer (1.5, 4.5) and (1.5, 1.25), with sigmoid(1.5) and sigmoid(1)
        (2, "sigmoid", [0.817574 * 1.5 + 0.731059 * 1.5, 0.817574 * 4.5 + 0.731059 * 1.25]),
    ],
)
def test_the_worked_answers_come_out_of_the_whole_layer(choices: int, gate_weight: str, answer: list[float]) -> None:
    layer = worked_layer(avg_k(4, choices, gate_weight=gate_weight))
    torch.testing.assert_close(layer.experts.mean_keys(), torch.tensor(MEANS, dtype=torch.float64))
    found = run_layer(layer, torch.tensor([[TOKEN]], dtype=torch.float64))
    assert found.flatten().tolist() == pytest.approx(answer, abs=1e-4)


def test_the_worked_blocks_and_weights() -> None:
    info = replace(token_info(1), expert_keys=torch.tensor(MEANS, dtype=torch.float64))
    plan = make_router(avg_k(gate_weight="softmax"), 2)(torch.tensor([TOKEN], dtype=torch.float64), info)
    assert plan.expert_ids.tolist() == [1, 3]
    assert plan.combine_weights.tolist() == pytest.approx([0.4628, 0.2807], abs=1e-4)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_all_blocks_with_weight_one_are_the_wide_dense_layer(activation: str) -> None:
    blocks, width, hidden_size = 6, 3, 5
    layer = layer_of(make_router(avg_k(blocks, blocks), hidden_size), ffn_size=width, activation=activation)
    dense = MLP(hidden_size, blocks * width, activation, ALONE.tp, init_std=1.0, output_std=1.0, dtype=torch.float64)
    make(dense, ALONE)
    with torch.no_grad():
        dense.w1.copy_(layer.experts.w1.transpose(0, 1).flatten(1, 2))
        dense.w2.copy_(layer.experts.w2.transpose(0, 1).flatten(1, 2))
    hidden = torch.randn(7, 2, hidden_size, dtype=torch.float64)
    torch.testing.assert_close(run_layer(layer, hidden), dense(hidden, context(7, 2, ALONE)))


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_a_score_is_the_mean_pre_activation_of_the_gate(activation: str) -> None:
    layer = layer_of(make_router(avg_k(4, 4, gate_weight="sigmoid"), 5), ffn_size=3, activation=activation)
    tokens = torch.randn(9, 5, dtype=torch.float64)
    info = replace(token_info(9), expert_keys=layer.experts.mean_keys())
    plan = layer.router(tokens, info)
    gate = torch.einsum("th,efh->tef", tokens, layer.experts.w1[:, 0]).mean(dim=2)
    wanted = gate.sigmoid().detach()
    found = weights_of(plan)
    assert found == pytest.approx({(t, e): float(wanted[t, e]) for t in range(9) for e in range(4)})
    # best first
    assert plan.expert_ids.view(9, 4).tolist() == gate.argsort(dim=1, descending=True).tolist()


def test_top_k_with_the_means_as_its_weights_is_the_learned_control() -> None:
    mine = avg_k(6, 3, gate_weight="softmax", aux_loss_coeff=0.01)
    control = MoEConfig(num_experts=6, router_type="top_k", router_topk=3, router_pre_softmax=True, aux_loss_coeff=0.01)
    router, learned = make_router(mine, 6), make_router(control, 6)
    info = token_info(12, 2, group_samples=2, padding=[(11, 0)])
    info = informed(router, info)
    assert info.expert_keys is not None
    with torch.no_grad():
        learned.get_parameter("weight").copy_(info.expert_keys)
    tokens = torch.randn(24, 6, dtype=torch.float64)
    plans = [router(tokens, info), learned(tokens, replace(info, expert_keys=None))]
    assert weights_of(plans[0]) == weights_of(plans[1])
    losses = [plan.aux_losses["load_balance_loss"].share.item() for plan in plans]
    assert losses[0] == losses[1] > 0


def test_the_balance_loss_reaches_tokens_but_not_detached_keys() -> None:
    for source, reaches in (("detached", False), ("live", True)):
        router = make_router(avg_k(aux_loss_coeff=0.01, key_source=source), 6)
        info = informed(router, token_info(10))
        tokens = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
        plan = router(tokens, info)
        plan.aux_losses["load_balance_loss"].share.backward()
        assert tokens.grad is not None and tokens.grad.abs().sum() > 0
        assert info.expert_keys is not None
        assert (info.expert_keys.grad is not None) is reaches
        assert not plan.combine_weights.requires_grad


def test_weight_one_learns_blocks_through_their_answers_only() -> None:
    layer = layer_of(make_router(avg_k(), 6), ffn_size=3, activation="relu")
    layer.experts.w1.grad = None
    hidden = torch.randn(5, 1, 6, dtype=torch.float64)
    run_layer(layer, hidden).sum().backward()
    used = layer.router(hidden[:, 0], replace(token_info(5), expert_keys=layer.experts.mean_keys())).expert_ids
    grad = layer.experts.w1.grad
    assert grad is not None
    assert set(grad.flatten(1).any(dim=1).nonzero()[:, 0].tolist()) <= set(used.tolist())


def key_gradients(rank: int, world_size: int, ep: int, etp: int) -> list[Any]:
    """[mean keys, the first weights, their gradient on this rank] when each rank uses the keys in its own way."""
    state = ParallelState.distributed(Grid(world_size, ep=ep, etp=etp)) if world_size > 1 else ALONE
    experts = Experts(8, 5, 4, "swiglu", state.ep, state.etp, init_std=1.0, output_std=1.0, dtype=torch.float64)
    materialise(nn.ModuleDict({"experts": experts}), state, 7, torch.device("cpu"))
    keys = experts.mean_keys()
    wishes = range(4) if world_size == 1 else [rank]
    sum((keys * torch.sin(torch.arange(40.0).view(8, 5) + 9 * wish)).square().sum() for wish in wishes).backward()
    assert experts.w1.grad is not None
    return [keys.tolist(), experts.w1.grad.tolist()]


@pytest.mark.parametrize(("ep", "etp"), [(4, 1), (1, 4), (2, 2)])
def test_mean_keys_and_their_gradients_do_not_depend_on_the_split(ep: int, etp: int) -> None:
    wanted_keys, wanted = (torch.tensor(found) for found in key_gradients(0, 1, 1, 1))
    answers = run_on_ranks(4, key_gradients, ep, etp)
    for rank, (keys, grad) in enumerate(answers):
        torch.testing.assert_close(torch.tensor(keys), wanted_keys)
        first, part = 8 // ep * (rank // etp), 4 // etp * (rank % etp)
        torch.testing.assert_close(torch.tensor(grad), wanted[first : first + 8 // ep, :, part : part + 4 // etp])
    # of the gate only, and the same for each of its rows
    assert not wanted[:, 1].any()
    torch.testing.assert_close(wanted[:, 0], wanted[:, 0, :1].expand(-1, 4, -1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (avg_k(key_source="live"), r"key_source=live has no effect with gate_weight=one"),
        (
            MoEConfig(num_experts=4, router_type="avg_k", token_drop_policy="probs", expert_capacity_factor=1.0),
            r"--moe-token-drop-policy probs has no effect with gate_weight=one",
        ),
        (avg_k(gate_weight="two"), r"gate_weight=two: expected one, softmax or sigmoid"),
        (
            MoEConfig(num_experts=4, router_type="avg_k", router_pre_softmax=True),
            r"--moe-router-pre-softmax .*has no effect with the router avg_k",
        ),
    ],
)
def test_what_has_no_effect_is_refused(config: MoEConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(config, 4, Site(NOBODY))


@pytest.mark.parametrize("loss", ["aux_loss_coeff", "z_loss_coeff"])
def test_live_keys_may_learn_from_a_loss_alone(loss: str) -> None:
    options = {"key_source": "live"}
    build_router(MoEConfig(num_experts=4, router_type="avg_k", router_options=options, **{loss: 0.1}), 4, Site(NOBODY))
