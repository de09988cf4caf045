"""The whole registry: what every layer without a router guarantees, its causality, every split, what it refuses."""

from typing import Any

import pytest
import torch
from layer_checks import (
    ALONE,
    HIDDEN,
    LENGTH,
    PADDING,
    ROWS,
    SAMPLES,
    ask,
    assert_same_numbers,
    check_equal,
    check_few,
    check_gradient,
    check_nan,
    check_padding,
    check_reach,
    check_repeats,
    draw,
    info_for,
    leaks,
    make_layer,
    numbers_of,
    objective,
)
from layers.contexts import context
from moe.unrouted import memories
from moe_rows import rows_of
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.moe.unrouted.memory import MemoryLayer
from megatron_moe.moe.unrouted.registry import UNROUTED
from megatron_moe.moe.unrouted.unrouted_layer import UnroutedLayer
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import layout_of
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.validate import validate


def example_of(name: str) -> dict[str, Any]:
    """Each layer's own: four experts of width 12."""
    facts = UNROUTED[name].facts
    assert facts is not None
    return {"router_type": name, "ffn_hidden_size": 12, **facts.example}


# every layer as its facts describe it, and each way of using it that is worth its own run
CASES: dict[str, dict[str, Any]] = {
    **{f"{name}, example": example_of(name) for name in UNROUTED},
    **memories.CASES,
    "soft_moe, groups": {"router_type": "soft_moe", "routing_group_samples": 2, "router_options": {"slots": "2"}},
    "soft_moe, noise": {"router_type": "soft_moe", "activation": "relu", "router_options": {"noise_std": "0.5"}},
    "smear, drawn": {
        "router_type": "smear",
        "activation": "gelu",
        "router_options": {"expert_dropout": "0.3", "jitter_eps": "0.1"},
    },
}
# trained with an estimate instead of the gradient; held to its formula in its own test
ESTIMATED = ("controller",)

each_case = pytest.mark.parametrize("name", CASES)
each_layer = pytest.mark.parametrize("name", UNROUTED)
trained_and_evaluated = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@each_case
@trained_and_evaluated
def test_gradients_are_those_of_finite_differences(name: str, train: bool) -> None:
    if not (train and CASES[name]["router_type"] in ESTIMATED):
        check_gradient(make_layer(CASES[name]), train=train)


@each_case
def test_gradients_reach_everything_that_is_learned_and_no_padding(name: str) -> None:
    check_reach(make_layer(CASES[name]))


@each_case
@trained_and_evaluated
def test_padding_has_no_place_no_load_and_no_loss(name: str, train: bool) -> None:
    check_padding(make_layer(CASES[name]), train=train)


@each_case
def test_padding_is_answered_with_zeros_by_the_whole_layer(name: str) -> None:
    segments = torch.zeros(LENGTH, SAMPLES, dtype=torch.int32)
    for place in PADDING:
        segments[place] = -1
    hidden = draw(len(ROWS)).view(LENGTH, SAMPLES, HIDDEN)
    out = make_layer(CASES[name])(hidden, context(LENGTH, SAMPLES, ALONE, segments=segments)).hidden
    assert out.shape == hidden.shape
    assert torch.equal(out.any(dim=2), segments == 0)


@each_case
def test_a_layer_sees_the_future_exactly_when_it_says_so(name: str) -> None:
    layer = make_layer(CASES[name])
    assert leaks(layer, train=True) is not layer.is_causal
    # what is not causal in training may be in evaluation: batch statistics are remembered ones then
    assert not (layer.is_causal and leaks(layer, train=False))


@each_case
def test_draws_are_for_training_and_repeat_with_seed_and_step(name: str) -> None:
    check_repeats(make_layer(CASES[name]))


@each_case
@trained_and_evaluated
def test_odd_inputs_are_answered_too(name: str, train: bool) -> None:
    layer = make_layer(CASES[name])
    check_few(layer, train=train)
    check_equal(layer, train=train)
    check_nan(layer, train=train)


@each_case
def test_bfloat16_tokens_are_answered_in_bfloat16_from_wide_scores(name: str) -> None:
    narrow, wide = (make_layer(CASES[name], dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    wide.load_state_dict({key: value.float() for key, value in narrow.state_dict().items()})
    tokens = draw(len(ROWS)).to(torch.bfloat16)
    answers = ask(narrow, tokens, info_for(narrow)).answers
    assert answers.dtype == torch.bfloat16
    torch.testing.assert_close(answers.float(), ask(wide, tokens.float(), info_for(wide)).answers, rtol=0.05, atol=0.05)


# four ranks that share every routing group: (tp, cp, ep, etp)
LAYOUTS = [(2, 2, 1, 1), (4, 1, 4, 1), (2, 2, 2, 1), (2, 2, 2, 2), (4, 1, 1, 4)]


def runs_on(layer: type[UnroutedLayer], layout: tuple[int, int, int, int]) -> bool:
    tp, cp, ep, etp = layout
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    try:
        layer.check_layout(parallel)
    except ConfigError:
        return False
    return True


def cases_on(layout: tuple[int, int, int, int]) -> list[str]:
    return [name for name, fields in CASES.items() if runs_on(UNROUTED[fields["router_type"]], layout)]


# answers and gradients of tokens by row, reported numbers, gradients of parameters and where they begin
Answer = tuple[dict[int, tuple[list[float], list[float]]], dict[str, Any], dict[str, tuple[tuple[int, ...], Any]]]


def asked_on_rank(rank: int, world_size: int, layout: tuple[int, int, int, int]) -> dict[str, Answer]:
    tp, cp, ep, etp = layout
    state = ParallelState.distributed(Grid(world_size, tp=tp, cp=cp, ep=ep, etp=etp))
    # whole positions, uneven, out of order, and nothing at all for rank 1
    mine = (torch.tensor([0, 2, 2, 3, 0, 2]) == rank).nonzero()[:, 0].flip(0)
    rows = ROWS.view(LENGTH, SAMPLES)[mine].flatten()
    found = {}
    for name in cases_on(layout):
        layer = make_layer(CASES[name], state=state)
        info = rows_of(info_for(layer), rows)
        tokens = draw(len(ROWS))[rows].requires_grad_()
        mixed = ask(layer, tokens, info)
        objective(mixed, info, rows).backward()
        assert tokens.grad is not None
        answers = mixed.answers.masked_fill(info.is_padding[:, None], 0.0)
        of_tokens = zip(rows.tolist(), answers.tolist(), tokens.grad.tolist(), strict=True)
        gradients = {
            key: (layout_of(leaf).offset(state), leaf.grad.tolist())
            for key, leaf in layer.named_parameters()
            if leaf.grad is not None
        }
        numbers = {key: value.tolist() for key, value in numbers_of(mixed).items()}
        found[name] = ({row: (answer, gradient) for row, answer, gradient in of_tokens}, numbers, gradients)
    return found


def summed(parts: list[tuple[tuple[int, ...], Any]], like: Tensor) -> Tensor:
    """All ranks' gradients, each added where its part of the parameter lies."""
    whole = torch.zeros_like(like)
    for offset, values in parts:
        part = torch.tensor(values, dtype=like.dtype)
        whole[tuple(slice(first, first + size) for first, size in zip(offset, part.shape, strict=True))] += part
    return whole


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-cp{}-ep{}-etp{}".format(*layout))
def test_every_split_of_tokens_and_parameters_gives_the_same_answers_and_gradients(
    layout: tuple[int, int, int, int],
) -> None:
    ranks = run_on_ranks(4, asked_on_rank, layout)
    for name in cases_on(layout):
        layer = make_layer(CASES[name])
        info, tokens = info_for(layer), draw(len(ROWS)).requires_grad_()
        mixed = ask(layer, tokens, info)
        objective(mixed, info).backward()
        of_tokens = {row: both for rank in ranks for row, both in rank[name][0].items()}
        found = torch.tensor([of_tokens[row] for row in ROWS.tolist()], dtype=torch.float64)
        assert tokens.grad is not None
        answers = mixed.answers.masked_fill(info.is_padding[:, None], 0.0)
        wanted = torch.stack([answers, tokens.grad], dim=1)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)
        numbers = [rank[name][1] for rank in ranks]
        sums = {key: sum(torch.tensor(part[key], dtype=torch.float64) for part in numbers) for key in numbers[0]}
        assert_same_numbers(sums, numbers_of(mixed))
        for key, parameter in layer.named_parameters():
            total = summed([rank[name][2][key] for rank in ranks], parameter)
            torch.testing.assert_close(total, parameter.grad, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")


@each_case
def test_ranks_that_see_other_tokens_sum_their_gradients(name: str) -> None:
    # the split test sums over all ranks; a rank that shares a place in the parameter must do so in training too
    for key, parameter in make_layer(CASES[name]).named_parameters():
        layout = layout_of(parameter)
        if layout.splits:
            needed = {axis for axis in ("ep", "etp") if UNROUTED[CASES[name]["router_type"]] not in MEMORIES or axis == "ep"}
            assert layout.reduce_over == "edp" and set(layout.splits.values()) == needed, key
        else:
            assert layout.reduce_over == "dp_cp" and layout.sum_over == ("tp",), key
