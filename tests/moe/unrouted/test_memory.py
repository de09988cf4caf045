"""What every memory of single cells is held to, whatever its way of choosing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from layers.contexts import context
from moe.unrouted.memories import ALONE, CASES, HIDDEN, ask, draw, make_memory
from moe_rows import rows_of, token_info
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.config.errors import ConfigError
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.unrouted.memory import MemoryLayer
from megatron_moe.moe.unrouted.registry import UNROUTED
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import layout_of
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.validate import validate

each_case = pytest.mark.parametrize("name", CASES)


def test_every_memory_of_the_registry_is_checked() -> None:
    memories = {name for name, layer in UNROUTED.items() if issubclass(layer, MemoryLayer)}
    assert {fields["router_type"] for fields in CASES.values()} == memories


def padded_info(*, train: bool = True, seed: int = 1) -> TokenInfo:
    """Groups of two samples and one of a single sample, which ends in padding."""
    return token_info(6, 3, group_samples=2, padding=[(5, 0), (5, 2), (4, 2), (0, 1)], train=train, seed=seed)


def objective(answers: Tensor, info: TokenInfo, rows: Tensor) -> Tensor:
    """Every answer counts, each with a factor of its own; padding does not, as in UnroutedLayer.forward."""
    real = answers.masked_fill(info.is_padding[:, None], 0.0)
    place = torch.arange(HIDDEN) + HIDDEN * rows[:, None]
    return (real * torch.sin(1.0 + 3.0 * place)).sum()


@each_case
def test_gradients_reach_everything_that_is_learned_and_no_padding(name: str) -> None:
    layer = make_memory(CASES[name])
    info = padded_info()
    tokens = draw(18).requires_grad_()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    known = set(vars(layer))
    mixed = ask(layer, tokens, info)
    objective(mixed.answers, info, torch.arange(18)).backward()
    assert tokens.grad is not None and tokens.grad[~info.is_padding].abs().sum(dim=1).all()
    assert not tokens.grad[info.is_padding].any()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
    # a forward pass writes nothing, and repeats itself
    assert set(vars(layer)) == known
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert torch.equal(ask(layer, tokens, info).answers, mixed.answers)


@each_case
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    # in training the controller's is a straight-through estimate: see test_controller.py
    train = CASES[name]["router_type"] != "controller"
    layer = make_memory(CASES[name])
    info = token_info(3, 2, group_samples=2, padding=[(2, 1)], train=train)
    rows = torch.arange(6)
    names = [key for key, _ in layer.named_parameters()]

    def value(tokens: Tensor, *learned: Tensor) -> Tensor:
        named = dict(zip(names, learned, strict=True))
        return objective(torch.func.functional_call(_Asked(layer), named, (tokens, info)), info, rows)

    names = [f"layer.{key}" for key in names]
    assert torch.autograd.gradcheck(value, (draw(6).requires_grad_(), *layer.parameters()))


class _Asked(torch.nn.Module):
    """The layer's mix as a forward pass, so that functional_call may replace parameters."""

    def __init__(self, layer: MemoryLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor, info: TokenInfo) -> Tensor:
        return ask(self.layer, tokens, info).answers


@each_case
def test_tables_say_how_they_are_split(name: str) -> None:
    for key, parameter in make_memory(CASES[name]).named_parameters():
        layout = layout_of(parameter)
        if key in ("values", "keys", "control"):
            assert (layout.splits, layout.reduce_over, layout.sum_over) == ({0: "ep"}, "edp", ())
        else:
            assert (layout.splits, layout.reduce_over, layout.sum_over) == ({}, "dp_cp", ("tp",))


@each_case
def test_counts_are_of_real_tokens_only(name: str) -> None:
    layer = make_memory(CASES[name])
    stats = ask(layer, draw(18), padded_info()).report.stats
    reads = {
        "vanilla_memory": 4,
        "vanilla_memory, 7 cells": 7,
        "low_rank_keys": 3,
        "product_keys": 6,
        "product_keys, batch": 8,
        "product_keys, 36 cells": 9,
        "product_keys_ffn": 8,
        "controller": 4,
        "controller, no noise": 8,
    }
    assert stats["tokens_per_expert"].shape == (4,)
    assert int(stats["tokens_per_expert"].sum()) == 14 * reads[name]
    assert int(stats["tokens"]) == 14
    assert not any(value.requires_grad for value in stats.values())


@each_case
def test_no_token_one_token_and_numbers_that_are_none(name: str) -> None:
    layer = make_memory(CASES[name])
    whole = token_info(4)
    nothing = replace(rows_of(whole, torch.arange(0)), group_tokens=torch.zeros(1, dtype=torch.int64))
    for train in (True, False):
        mixed = ask(layer, draw(0).requires_grad_(), replace(nothing, train=train))
        assert mixed.answers.shape == (0, HIDDEN)
        mixed.answers.sum().backward()
        assert not mixed.report.stats["tokens_per_expert"].any()
        assert ask(layer, draw(1), train=train).answers.isfinite().all()
        odd = draw(4)
        odd[1] = torch.nan
        answers = ask(layer, odd, train=train).answers
        if layer.is_causal:
            assert answers[[0, 2, 3]].isfinite().all()


@each_case
def test_a_token_reads_nothing_of_others_exactly_when_the_layer_says_so(name: str) -> None:
    layer = make_memory(CASES[name])
    tokens = draw(18)
    changed = tokens.clone()
    changed[-1] *= -2.0
    info = token_info(6, 3, group_samples=2)
    first, second = ask(layer, tokens, info).answers, ask(layer, changed, info).answers
    # the last token is of the third sample, whose group is its own
    mine = info.sequences == 2
    mine[-1] = False
    assert torch.equal(first[mine], second[mine]) is layer.is_causal
    assert torch.equal(first[info.sequences < 2], second[info.sequences < 2])


@each_case
def test_only_a_random_layer_depends_on_the_seed_and_only_in_training(name: str) -> None:
    layer = make_memory(CASES[name])

    def answers(train: bool, seed: int) -> Tensor:
        return ask(layer, draw(18), padded_info(train=train, seed=seed)).answers

    assert torch.equal(answers(False, 1), answers(False, 2))
    assert torch.equal(answers(True, 1), answers(True, 2)) is not layer.is_random
    assert layer.is_random is (name == "controller")


@each_case
def test_bfloat16_tokens_are_answered_in_bfloat16_from_wide_scores(name: str) -> None:
    narrow, wide = make_memory(CASES[name], dtype=torch.bfloat16), make_memory(CASES[name], dtype=torch.float32)
    wide.load_state_dict({key: value.float() for key, value in narrow.state_dict().items()})
    tokens = draw(18).to(torch.bfloat16)
    answers = ask(narrow, tokens, padded_info()).answers
    assert answers.dtype == torch.bfloat16
    torch.testing.assert_close(answers.float(), ask(wide, tokens.float(), padded_info()).answers, rtol=0.05, atol=0.05)


Answer = tuple[list[Any], dict[str, list[Any]], dict[str, Any], dict[str, list[Any]]]


def rows_on(rank: int) -> Tensor:
    """Uneven, out of order, and nothing at all for rank 1."""
    return (torch.tensor([0, 2, 2, 3, 0, 2])[torch.arange(18) % 6] == rank).nonzero()[:, 0].flip(0)


def asked_on_rank(rank: int, world_size: int, ep: int) -> dict[str, Answer]:
    """For each case: answers and gradients of tokens, gradients of parameters, statistics, remembered state."""
    state = ParallelState.distributed(Grid(world_size, tp=world_size, ep=ep))
    rows, found = rows_on(rank), {}
    info = rows_of(padded_info(), rows)
    for name, fields in CASES.items():
        layer = make_memory(fields, state=state)
        tokens = draw(18)[rows].requires_grad_()
        mixed = ask(layer, tokens, info)
        objective(mixed.answers, info, rows).backward()
        assert tokens.grad is not None
        of_tokens = list(zip(rows.tolist(), mixed.answers.tolist(), tokens.grad.tolist(), strict=True))
        gradients = {key: leaf.grad.tolist() for key, leaf in layer.named_parameters() if leaf.grad is not None}
        stats = {key: value.double().tolist() for key, value in mixed.report.stats.items()}
        found[name] = (of_tokens, gradients, stats, {key: list(leaf.shape) for key, leaf in layer.named_parameters()})
    return found


@pytest.mark.parametrize("ep", [4, 2])
def test_every_split_of_tokens_and_tables_gives_the_same_answers_and_gradients(ep: int) -> None:
    answers = run_on_ranks(4, asked_on_rank, ep)
    info = padded_info()
    for name, fields in CASES.items():
        layer = make_memory(fields)
        tokens = draw(18).requires_grad_()
        mixed = ask(layer, tokens, info)
        objective(mixed.answers, info, torch.arange(18)).backward()
        assert tokens.grad is not None
        ranks = [answer[name] for answer in answers]
        for row, answer, gradient in (entry for of_tokens, *_ in ranks for entry in of_tokens):
            assert answer == pytest.approx(mixed.answers[row].tolist(), rel=1e-10, abs=1e-12), name
            assert gradient == pytest.approx(tokens.grad[row].tolist(), rel=1e-10, abs=1e-12), name
        assert sum(len(of_tokens) for of_tokens, *_ in ranks) == 18
        for key, value in mixed.report.stats.items():
            total = sum(torch.tensor(rank[2][key], dtype=torch.float64) for rank in ranks)
            torch.testing.assert_close(total, value.double(), rtol=1e-10, atol=1e-12)
        for key, parameter in layer.named_parameters():
            parts = [torch.tensor(rank[1][key], dtype=torch.float64) for rank in ranks]
            if layout_of(parameter).splits:
                # ranks ep apart hold the same rows
                assert ranks[0][3][key][0] == parameter.shape[0] // ep
                parts = [torch.cat(parts[first : first + ep]) for first in range(0, 4, ep)]
            torch.testing.assert_close(torch.stack(parts).sum(dim=0), parameter.grad, rtol=1e-9, atol=1e-12)


def model(fields: dict[str, Any], parallel: dict[str, Any] | None = None) -> Any:
    return tiny_config({"ffn_hidden_size": 16, **fields}, parallel or {}, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_type": "vanilla_memory"}, r"swiglu has a gate, .* give --moe-activation gelu or relu\."),
        ({"router_type": "low_rank_keys", "activation": "geglu"}, r"geglu has a gate"),
        ({"router_type": "controller"}, r"swiglu has a gate"),
        ({"router_type": "product_keys_ffn"}, r"swiglu has a gate"),
        ({"router_type": "product_keys", "activation": "relu"}, r"--moe-activation \"relu\" has no effect"),
        ({**CASES["vanilla_memory"], "aux_loss_coeff": 0.1}, r"--moe-aux-loss-coeff 0.1 has no effect"),
        ({**CASES["controller"], "expert_capacity_factor": 1.0}, r"--moe-expert-capacity-factor 1.* has no effect"),
        (
            {**CASES["controller"], "token_dispatcher_type": "local"},
            r"--moe-token-dispatcher-type \"local\" has no effect",
        ),
        (
            {**CASES["vanilla_memory, 7 cells"], "router_topk": 1},
            r"--moe-router-topk 1 has no effect .* active_cells=7",
        ),
        (
            {**CASES["vanilla_memory"], "router_topk": 2, "router_options": {"active_cells": "65"}},
            r"active_cells=65 asks for more than the memory's 64 cells; use 64 or fewer\.",
        ),
        ({**CASES["vanilla_memory"], "router_options": {"rank": "3"}}, r"no such option"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(model(fields))


@each_case
def test_expert_tensor_parallelism_is_refused_with_the_reason(name: str) -> None:
    fields = {"allow_noncausal": True, **CASES[name], "routing_group_samples": 1}
    if "num_subkeys" in fields.get("router_options", {}):
        fields["ffn_hidden_size"] = None
    validate(model(fields, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}))
    with pytest.raises(ConfigError, match="tables are split by rows over --expert-model-parallel-size"):
        validate(model(fields, {"tensor_model_parallel_size": 2}))


def test_padding_is_answered_with_zeros_by_the_whole_layer() -> None:
    segments = torch.zeros(4, 2, dtype=torch.int32)
    segments[3, 1] = -1
    hidden = draw(8).view(4, 2, HIDDEN)
    out = make_memory(CASES["vanilla_memory"])(hidden, context(4, 2, ALONE, segments=segments)).hidden
    assert out.shape == hidden.shape
    assert not out[3, 1].any() and out[3, 0].any()
