"""What Soft MoE and SMEAR are both held to; with the memories of test_memory.py, all layers without assignments are."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from layers.contexts import context
from moe.unrouted.soft_layers import ALONE, EXPERTS, HIDDEN, answers, draw, make_layer
from moe_rows import rows_of, token_info
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.config.errors import ConfigError
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.memory import MemoryLayer
from megatron_moe.moe.unrouted.registry import UNROUTED
from megatron_moe.moe.unrouted.unrouted_layer import UnroutedLayer
from megatron_moe.parallel.collectives import shares
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import layout_of
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.validate import validate

LENGTH, SAMPLES = 6, 3
CASES: dict[str, dict[str, Any]] = {
    "soft_moe": {"router_options": {"slots": "2"}, "routing_group_samples": 2},
    "soft_moe, noise": {"router_options": {"slots": "1", "noise_std": "0.5"}},
    "smear": {},
    "smear, drawn": {"router_options": {"expert_dropout": "0.3", "jitter_eps": "0.1"}},
}
each_case = pytest.mark.parametrize("name", CASES)


def layer_of(name: str, state: ParallelState = ALONE) -> UnroutedLayer:
    return make_layer(name.split(",")[0], state=state, **CASES[name])


def info_of(name: str, *, train: bool = True, seed: int = 1) -> TokenInfo:
    """Groups of two samples and one of a single sample, which ends in padding."""
    group = CASES[name].get("routing_group_samples", 1)
    padding = [(5, 0), (5, 2), (4, 2)]
    return token_info(LENGTH, SAMPLES, group_samples=group, padding=padding, train=train, seed=seed)


def objective(found: Tensor, info: TokenInfo, rows: Tensor) -> Tensor:
    """Every answer counts, each with a factor of its own; padding does not."""
    real = found.masked_fill(info.is_padding[:, None], 0.0)
    return (real * torch.sin(1.0 + 3.0 * (torch.arange(HIDDEN) + HIDDEN * rows[:, None]))).sum()


def test_every_layer_of_the_registry_is_checked() -> None:
    soft = {name.split(",")[0] for name in CASES}
    assert soft | {name for name, layer in UNROUTED.items() if issubclass(layer, MemoryLayer)} == set(UNROUTED)


class _Asked(torch.nn.Module):
    """The layer as a function of its tokens, so that functional_call may replace parameters."""

    def __init__(self, layer: UnroutedLayer, info: TokenInfo) -> None:
        super().__init__()
        self.layer = layer
        self.info = info

    def forward(self, tokens: Tensor) -> Tensor:
        return answers(self.layer, tokens, self.info, samples=SAMPLES)


@each_case
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    layer, info = layer_of(name), info_of(name)
    names = [f"layer.{key}" for key, _ in layer.named_parameters()]

    def value(tokens: Tensor, *given: Tensor) -> Tensor:
        found = torch.func.functional_call(_Asked(layer, info), dict(zip(names, given, strict=True)), (tokens,))
        return objective(found, info, torch.arange(LENGTH * SAMPLES))

    assert torch.autograd.gradcheck(value, (draw(LENGTH * SAMPLES).requires_grad_(), *layer.parameters()))


@each_case
def test_padding_has_no_say_and_a_forward_pass_writes_nothing(name: str) -> None:
    layer, info = layer_of(name), info_of(name)
    tokens, known = draw(LENGTH * SAMPLES), set(vars(layer))
    first = answers(layer, tokens, info, samples=SAMPLES)
    changed = tokens.clone()
    changed[info.is_padding] *= -3.0
    second = answers(layer, changed, info, samples=SAMPLES)
    assert torch.equal(first[~info.is_padding], second[~info.is_padding])
    assert set(vars(layer)) == known and torch.equal(answers(layer, tokens, info, samples=SAMPLES), first)
    mixed = layer.mix(tokens, info, context(LENGTH, SAMPLES, ALONE))
    again = layer.mix(changed, info, context(LENGTH, SAMPLES, ALONE))
    for key, value in mixed.report.stats.items():
        assert torch.equal(value, again.report.stats[key]) and not value.requires_grad
    assert int(mixed.report.stats["tokens"]) == LENGTH * SAMPLES - 3


@each_case
def test_a_later_token_changes_what_earlier_ones_get_but_no_other_group(name: str) -> None:
    layer = layer_of(name)
    group = CASES[name].get("routing_group_samples", 1)
    info = token_info(LENGTH, SAMPLES, group_samples=group)
    tokens = draw(LENGTH * SAMPLES)
    changed = tokens.clone()
    changed[-1] *= -2.0  # the last token of the last sample
    first, second = (answers(layer, given, info, samples=SAMPLES) for given in (tokens, changed))
    mine = info.sequences == SAMPLES - 1
    mine[-1] = False
    assert not layer.is_causal and not torch.equal(first[mine], second[mine])
    assert torch.equal(first[info.sequences < SAMPLES - 1], second[info.sequences < SAMPLES - 1])


@each_case
def test_only_a_random_layer_depends_on_the_seed_and_only_in_training(name: str) -> None:
    layer = layer_of(name)

    def found(train: bool, seed: int) -> Tensor:
        return answers(layer, draw(LENGTH * SAMPLES), info_of(name, train=train, seed=seed), samples=SAMPLES)

    assert torch.equal(found(False, 1), found(False, 2))
    assert torch.equal(found(True, 1), found(True, 1))
    assert torch.equal(found(True, 1), found(True, 2)) is not layer.is_random
    assert layer.is_random is ("," in name)


@each_case
def test_no_token_one_token_and_numbers_that_are_none(name: str) -> None:
    layer = layer_of(name)
    whole = token_info(1, 1)
    nothing = replace(
        rows_of(whole, torch.arange(0)),
        group_tokens=torch.zeros(1, dtype=torch.int64),
        sequence_tokens=torch.zeros(1, dtype=torch.int64),
    )
    assert answers(layer, draw(0), nothing, samples=1).shape == (0, HIDDEN)
    assert answers(layer, draw(1), whole, samples=1).isfinite().all()
    info = token_info(LENGTH, SAMPLES, group_samples=CASES[name].get("routing_group_samples", 1))
    odd = draw(LENGTH * SAMPLES)
    odd[-1] = torch.nan
    found = answers(layer, odd, info, samples=SAMPLES)
    # a group's NaN stays there
    assert found[info.sequences < SAMPLES - 1].isfinite().all()
    assert not found[info.sequences == SAMPLES - 1].isfinite().all()


Answer = tuple[list[Any], dict[str, Any], dict[str, Any]]


def asked_on_rank(rank: int, world_size: int) -> dict[str, Answer]:
    """For each case: answers and gradients of tokens, gradients of parameters, statistics. Rows in uneven shares."""
    found = {}
    states = {
        "soft_moe": ParallelState.distributed(Grid(world_size, tp=world_size, ep=EXPERTS if world_size == 3 else 1)),
        "smear": ParallelState.distributed(Grid(world_size, tp=world_size)),
    }
    for name in CASES:
        rows_each = shares(LENGTH, world_size)
        start = sum(rows_each[:rank])
        rows = torch.arange(start * SAMPLES, (start + rows_each[rank]) * SAMPLES)
        layer = layer_of(name, states[name.split(",")[0]])
        tokens = draw(LENGTH * SAMPLES)[rows].requires_grad_()
        info = rows_of(info_of(name), rows)
        mixed = layer.mix(tokens, info, context(rows_each[rank], SAMPLES, ALONE))
        objective(mixed.answers, info, rows).backward()
        assert tokens.grad is not None
        of_tokens = list(zip(rows.tolist(), mixed.answers.tolist(), tokens.grad.tolist(), strict=True))
        gradients = {key: leaf.grad.tolist() for key, leaf in layer.named_parameters() if leaf.grad is not None}
        stats = {key: value.double().tolist() for key, value in mixed.report.stats.items()}
        found[name] = (of_tokens, gradients, stats)
    return found


@pytest.mark.parametrize("world_size", [3, 4])
def test_every_split_of_rows_and_experts_gives_the_same_answers_and_gradients(world_size: int) -> None:
    ranks = run_on_ranks(world_size, asked_on_rank)
    for name in CASES:
        layer, info = layer_of(name), info_of(name)
        tokens = draw(LENGTH * SAMPLES).requires_grad_()
        mixed = layer.mix(tokens, info, context(LENGTH, SAMPLES, ALONE))
        objective(mixed.answers, info, torch.arange(LENGTH * SAMPLES)).backward()
        assert tokens.grad is not None
        for row, answer, gradient in (entry for rank in ranks for entry in rank[name][0]):
            if not info.is_padding[row]:
                assert answer == pytest.approx(mixed.answers[row].tolist(), rel=1e-10, abs=1e-12), name
            assert gradient == pytest.approx(tokens.grad[row].tolist(), rel=1e-10, abs=1e-12), name
        for key, value in mixed.report.stats.items():
            total = sum(torch.tensor(rank[name][2][key], dtype=torch.float64) for rank in ranks)
            torch.testing.assert_close(total, value.double(), rtol=1e-10, atol=1e-12)
        for key, parameter in layer.named_parameters():
            parts = [torch.tensor(rank[name][1][key], dtype=torch.float64) for rank in ranks]
            split = bool(layout_of(parameter).splits) and parts[0].shape != parameter.shape
            whole = torch.cat(parts) if split else torch.stack(parts).sum(dim=0)
            torch.testing.assert_close(whole, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_type": "soft_moe"}, r"soft_moe looks at later tokens .*, which a causal decoder must not"),
        ({"router_type": "smear"}, r"smear looks at later tokens"),
        ({"router_type": "soft_moe", "router_topk": 3}, r"--moe-router-topk 3 has no effect with the router soft_moe"),
        ({"router_type": "smear", "aux_loss_coeff": 0.1}, r"--moe-aux-loss-coeff 0.1 has no effect"),
        ({"router_type": "soft_moe", "expert_capacity_factor": 1.0}, r"--moe-expert-capacity-factor 1.* has no effect"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config(fields, {}, {}))


@pytest.mark.parametrize("name", ["soft_moe", "smear"])
def test_an_encoder_may_see_all_of_its_text(name: str) -> None:
    encoder = {"router_type": name}
    validate(tiny_config({"num_experts": 0}, {}, {"encoder_num_layers": 2}, encoder_moe=encoder))
