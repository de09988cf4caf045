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
from megatron_moe.config.run import RunConfig
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
# trained with an estimate instead of the gradient, which its own test holds to its formula
ESTIMATED = ("controller",)
DIFFERENTIATED = [
    (name, train)
    for name, fields in CASES.items()
    for train in (True, False)
    if not (train and fields["router_type"] in ESTIMATED)
]

each_case = pytest.mark.parametrize("name", CASES)
each_layer = pytest.mark.parametrize("name", UNROUTED)
trained_and_evaluated = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@pytest.mark.parametrize(("name", "train"), DIFFERENTIATED)
def test_gradients_are_those_of_finite_differences(name: str, train: bool) -> None:
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
def test_gradients_are_summed_over_all_ranks_that_the_split_test_sums_over(name: str) -> None:
    layer = make_layer(CASES[name])
    for key, parameter in layer.named_parameters():
        layout = layout_of(parameter)
        if layout.splits:
            # along ep and etp a parameter is either split, or the layer refuses to run
            runs = {"ep": runs_on(type(layer), (1, 1, 2, 1)), "etp": runs_on(type(layer), (1, 1, 1, 2))}
            assert layout.reduce_over == "edp" and {axis for axis in runs if runs[axis]} <= set(layout.splits.values())
        else:
            assert (layout.reduce_over, layout.sum_over) == ("dp_cp", ("tp",)), key


# reasons not to be split, by layer and flag; what is not here runs, as the split test shows
MERGED = r"--moe-router-type smear averages the parameters of all experts"
BY_ROWS = r"cannot split a memory of single cells: its tables are split by rows over --expert-model-parallel-size"
REASONS: dict[tuple[str, str], str] = {
    ("smear", "--expert-model-parallel-size"): MERGED,
    ("smear", "--expert-tensor-parallel-size"): MERGED,
    **{
        (name, "--expert-tensor-parallel-size"): BY_ROWS
        for name in ("vanilla_memory", "low_rank_keys", "product_keys", "product_keys_ffn", "controller")
    },
}


def model_of(fields: dict[str, Any], parallel: dict[str, Any]) -> RunConfig:
    """A whole model, micro-batches of one sample."""
    squares = "num_subkeys" in fields.get("router_options", {})
    width = {"ffn_hidden_size": None if squares else 16}
    return tiny_config({**width, **fields, "routing_group_samples": 1}, parallel, {})


@each_layer
@pytest.mark.parametrize(
    ("parallel", "flag"),
    [
        ({"expert_model_parallel_size": 2}, "--expert-model-parallel-size"),
        ({"expert_tensor_parallel_size": 2}, "--expert-tensor-parallel-size"),
        ({"tensor_model_parallel_size": 2}, "--expert-tensor-parallel-size"),  # which follows it
    ],
    ids=["ep", "etp", "tp"],
)
def test_a_layout_is_refused_by_flag_and_reason_or_runs(name: str, parallel: dict[str, int], flag: str) -> None:
    fields = {**example_of(name), "allow_noncausal": True}
    if (name, flag) not in REASONS:
        validate(model_of(fields, parallel))
        return
    with pytest.raises(ConfigError, match=REASONS[name, flag]) as found:
        validate(model_of(fields, parallel))
    assert f"{flag} 2" in str(found.value)
    # the way out that the message names
    validate(model_of(fields, {**parallel, "expert_model_parallel_size": 1, "expert_tensor_parallel_size": 1}))


@each_case
def test_a_causal_decoder_takes_no_layer_that_sees_the_future_unless_told_to(name: str) -> None:
    fields = CASES[name]
    if make_layer(fields).is_causal:
        assert validate(model_of(fields, {})) == []
        return
    problem = f"--moe-router-type {fields['router_type']}"
    with pytest.raises(ConfigError, match=f"{problem} looks at later tokens .*--moe-allow-noncausal"):
        validate(model_of(fields, {}))
    (note,) = validate(model_of({**fields, "allow_noncausal": True}, {}))
    assert note.startswith(f"{problem} sees later tokens")


@each_layer
def test_an_encoder_may_see_all_of_its_text(name: str) -> None:
    validate(tiny_config({"num_experts": 0}, {}, {"encoder_num_layers": 2}, encoder_moe=example_of(name)))
