"""Mixture-of-Depths in a whole block: exactly C tokens are worked on, the others pass unchanged, attention included."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.certify.tiny_model import ENCODER_LENGTH, LENGTH, VOCAB, pairs, samples, tiny_config
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.inference.generate import Generator, decoding_view
from megatron_moe.inference.kv_cache import ReservedCache
from megatron_moe.inference.limits import decoding_notes
from megatron_moe.inference.sampling import Sampling
from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.models.build import gpt_spec
from megatron_moe.models.depth import DepthBlock, build_block
from megatron_moe.models.gpt import GPTStage
from megatron_moe.models.transformer import TransformerLayer
from megatron_moe.models.whole import plain_context
from megatron_moe.moe.routers.mixture_of_depths import MixtureOfDepthsRouter
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import grid_of
from megatron_moe.training.flops import flops_per_token
from megatron_moe.training.metrics import summarise_routing
from megatron_moe.training.step import view_of
from tests.inference.tiny_models import build, generator_of, greedy_by_whole_passes, tiny_run

ALONE = ParallelState.alone()
DEPTHS = {"router_type": "mixture_of_depths", "num_experts": 1, "router_topk": 1, "ffn_hidden_size": None}


def block_of(**options: str) -> DepthBlock:
    config = tiny_config({**DEPTHS, "router_options": {"capacity": "0.375", **options}}, {}, {"init_method_std": 0.4})
    block = build_block(gpt_spec(config, VOCAB).layers[1], ALONE)
    assert isinstance(block, DepthBlock)
    materialise(block, ALONE, 3, torch.device("cpu"))
    return block


def context(numbers: list[int], *, train: bool = True) -> ForwardContext:
    view = view_of(samples(numbers).decoder, torch.tensor(numbers), ALONE, torch.device("cpu"))
    return ForwardContext(view=view, random=KeyedRandom(1), train=train, sequence_parallel=False)


def draw(samples_: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(LENGTH, samples_, 16, generator=generator, dtype=torch.float64)


def one_sample(view: SequenceView, sample: int) -> SequenceView:
    cut = {name: getattr(view, name)[:, sample : sample + 1] for name in ("tokens", "positions", "segments")}
    return replace(view, **cut, sample_ids=view.sample_ids[sample : sample + 1])


def by_hand(block: DepthBlock, hidden: Tensor, ctx: ForwardContext, chosen: list[int], sample: int) -> Tensor:
    """One sample: the block on its chosen rows as a sequence of their own."""
    layer = block.depth.block
    rows = torch.tensor(chosen)
    view = ctx.view
    picked = replace(
        view,
        tokens=view.tokens[rows, sample : sample + 1],
        positions=view.positions[rows, sample : sample + 1],
        segments=view.segments[rows, sample : sample + 1],
        sample_ids=view.sample_ids[sample : sample + 1],
        rows=torch.arange(len(rows)),
        segmented=True,
    )
    if view.prefix is not None:
        picked = replace(picked, prefix=view.prefix[rows, sample : sample + 1])
    given = hidden[rows, sample : sample + 1]
    source = None if ctx.source is None else one_sample(ctx.source, sample)
    memory = None if ctx.memory is None else ctx.memory[:, sample : sample + 1]
    bias = None if ctx.bias is None else ctx.bias[:, :, rows][..., rows]
    out, _ = layer(given, replace(ctx, view=picked, source=source, memory=memory, bias=bias))
    r = given @ block.depth.router.weight.t()
    found = hidden[:, sample].clone()
    found[rows] = (given + r * (out - given)).squeeze(1)
    return found


def best_rows(block: DepthBlock, hidden: Tensor, ctx: ForwardContext, sample: int, count: int) -> list[int]:
    """The count largest r among the real tokens, in the order of the sequence."""
    r = (hidden[:, sample] @ block.depth.router.weight.t()).squeeze(1)
    real = [row for row in range(LENGTH) if ctx.view.segments[row, sample] >= 0]
    return sorted(sorted(real, key=lambda row: -r[row].item())[:count])


@pytest.mark.parametrize("train", [True, False])
def test_chosen_tokens_pass_through_the_block_and_the_others_do_not(train: bool) -> None:
    block, hidden = block_of(inference="top_k"), draw(3)
    ctx = context([0, 1, 2], train=train)  # the first ends in padding, the second holds two documents
    found, report = block(hidden, ctx)
    for sample in range(3):
        chosen = best_rows(block, hidden, ctx, sample, 3)  # 0.375 of eight
        torch.testing.assert_close(found[:, sample], by_hand(block, hidden, ctx, chosen, sample))
        others = [row for row in range(LENGTH) if row not in chosen]
        assert torch.equal(found[others, sample], hidden[others, sample])
    assert report.stats["tokens_per_expert"].tolist() == [9]
    assert set(report.aux_losses) == ({"predictor_loss"} if train else set())


@pytest.mark.parametrize("inference", ["top_k", "predictor"])
def test_chosen_tokens_keep_their_distances_their_prefix_and_what_they_look_at(inference: str) -> None:
    fields = {**DEPTHS, "router_options": {"capacity": "0.375", "inference": inference}}
    config = tiny_config(fields, {}, {"init_method_std": 0.4, "encoder_num_layers": 1})
    block = build_block(gpt_spec(config, VOCAB).layers[2], ALONE)
    materialise(block, ALONE, 3, torch.device("cpu"))
    assert isinstance(block, DepthBlock)
    torch.manual_seed(2)
    batch = pairs([0, 1, 2])
    ctx = context([0, 1, 2], train=False)
    prefix = torch.zeros(LENGTH, 3, dtype=torch.bool)
    prefix[:2] = True
    encoder = batch.encoder
    assert encoder is not None
    ctx = replace(
        ctx,
        view=replace(ctx.view, prefix=prefix),
        bias=torch.randn(1, 4, LENGTH, LENGTH, dtype=torch.float64),
        source=view_of(encoder, batch.sample_ids, ALONE, torch.device("cpu")),
        memory=torch.randn(ENCODER_LENGTH, 3, 16, dtype=torch.float64),
    )
    hidden = draw(3)
    found, _ = block(hidden, ctx)
    r = (hidden @ block.depth.router.weight.t()).squeeze(2)
    for sample in range(3):
        chosen = best_rows(block, hidden, ctx, sample, 3)
        if inference == "predictor":
            chosen = [row for row in range(LENGTH) if r[row, sample] > 0 and ctx.view.segments[row, sample] >= 0]
        assert 1 < len(chosen) < LENGTH
        torch.testing.assert_close(found[:, sample], by_hand(block, hidden, ctx, chosen, sample))


def test_the_predictor_decides_token_by_token() -> None:
    block, hidden = block_of(inference="predictor"), draw(2)
    ctx = context([1, 2], train=False)
    found, _ = block(hidden, ctx)
    r = (hidden @ block.depth.router.weight.t()).squeeze(2)
    for sample in range(2):
        chosen = [row for row in range(LENGTH) if r[row, sample] > 0]
        assert 0 < len(chosen) < LENGTH
        torch.testing.assert_close(found[:, sample], by_hand(block, hidden, ctx, chosen, sample))
    # causal: what comes later changes nothing before
    changed = hidden.clone()
    changed[-1] += 3.0
    torch.testing.assert_close(block(changed, ctx)[0][:-1], found[:-1])
    # in training the best of the whole sequence are taken, and a later token can push an earlier one out
    training = context([1, 2])
    changed[-1] = 100.0 * block.depth.router.weight.detach()
    assert not torch.equal(block(changed, training)[0][:-1], block(hidden, training)[0][:-1])


def test_gradients_reach_the_router_and_the_block() -> None:
    block, hidden = block_of(), draw(2).requires_grad_()
    out, report = block(hidden, context([1, 2]))
    (out.sum() + report.aux_losses["predictor_loss"].share).backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_finite_differences_agree() -> None:
    block, ctx = block_of(), context([1, 2])
    names = [name for name, _ in block.named_parameters() if "router" in name or "w2" in name]

    def value(hidden: Tensor, *given: Tensor) -> Tensor:
        out, report = torch.func.functional_call(block, dict(zip(names, given, strict=True)), (hidden, ctx))
        return (out * torch.sin(torch.arange(16.0))).sum() + report.aux_losses["predictor_loss"].share

    parameters = [block.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(value, (draw(2).requires_grad_(), *parameters))


def test_the_worked_choice_and_its_cross_entropy() -> None:
    block = block_of(capacity="0.25")
    router = block.depth.router
    assert isinstance(router, MixtureOfDepthsRouter)
    r = torch.tensor([0.3, -0.1, 1.2, 0.8, -0.5, 0.0, 0.4, 0.9], dtype=torch.float64)
    hidden = torch.zeros(8, 1, 16, dtype=torch.float64)
    hidden[:, 0, 0] = r
    with torch.no_grad():
        router.weight.zero_()[0, 0] = 1.0
    ctx = context([2])
    out, report = block(hidden, ctx)
    assert [row for row in range(8) if not torch.equal(out[row], hidden[row])] == [2, 7]
    assert report.aux_losses["predictor_loss"].share.item() / 8 == pytest.approx(0.6693, abs=1e-4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--num-experts 2: the one expert of mixture_of_depths is the block itself"):
        build_block(gpt_spec(tiny_config({**DEPTHS, "num_experts": 2}, {}, {}), VOCAB).layers[1], ALONE)
    with pytest.raises(ConfigError, match="--context-parallel-size 2 cuts sequences"):
        MixtureOfDepthsRouter.check_layout(ParallelConfig(context_parallel_size=2))
    with pytest.raises(ConfigError, match="--expert-tensor-parallel-size 2 has no effect"):
        MixtureOfDepthsRouter.check_layout(ParallelConfig(expert_tensor_parallel_size=2))
    MixtureOfDepthsRouter.check_layout(ParallelConfig(tensor_model_parallel_size=2))
    MixtureOfDepthsRouter.check_layout(ParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=1))
    block = block_of(inference="top_k")
    cache = ReservedCache({1: (2, 4)}, max_length=8, num_samples=1, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="inference=top_k compares a token with later ones"):
        block(draw(1), replace(context([2], train=False), cache=cache))


def model_of(**options: str) -> GPTStage:
    """A whole model whose second and fourth block choose tokens; first weights are large, so that choices differ."""
    moe = {**DEPTHS, "allow_noncausal": True, "router_options": {"capacity": "0.5", **options}}
    run = tiny_run(moe, {"qk_layernorm": "head"})
    (stage,) = build(run, ALONE)
    return stage


def logits_of(stage: GPTStage, tokens: Tensor, *, train: bool) -> Tensor:
    """(S, B, V)."""
    with torch.no_grad():
        found: Tensor = stage({}, replace(plain_context(tokens), train=train)).tensors["logits"]
    return found


@pytest.mark.parametrize(
    ("inference", "train", "leaks"), [("predictor", True, True), ("predictor", False, False), ("top_k", False, True)]
)
def test_a_later_token_changes_earlier_logits_only_where_the_best_are_taken(
    inference: str, train: bool, leaks: bool
) -> None:
    stage, tokens = model_of(inference=inference), torch.randperm(VOCAB)[None, :12]
    before = logits_of(stage, tokens, train=train)[:-1]
    changed = False
    for other in range(12):
        tokens[0, -1] = other
        changed |= bool((logits_of(stage, tokens, train=train)[:-1] - before).abs().max() > 1e-9)
    assert changed is leaks


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6, 7, 8), (3, 4, 8)], ids=["token by token", "in runs"])
def test_decoding_with_a_cache_equals_a_whole_pass(cuts: tuple[int, ...]) -> None:
    stage, tokens = model_of(), torch.randint(VOCAB, (3, 8))
    wanted = logits_of(stage, tokens, train=False)
    cache = ReservedCache.for_stages([stage], max_length=8, num_samples=3, device=torch.device("cpu"))
    found, chosen, start = [], 0, 0
    for stop in cuts:
        view = decoding_view(tokens.t()[start:stop], start, torch.arange(3))
        ctx = ForwardContext(view, KeyedRandom(0), train=False, sequence_parallel=False, cache=cache)
        with torch.no_grad():
            output = stage({}, ctx)
        found.append(output.tensors["logits"])
        chosen += int(output.reports[0].stats["tokens_per_expert"])
        start = stop
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-10, atol=1e-12)
    assert 0 < chosen < 24 and cache.position == 8
    cache.rewind(2)
    ctx = replace(ctx, view=decoding_view(tokens.t()[2:], 2, torch.arange(3)))
    with torch.no_grad():
        again = stage({}, ctx).tensors["logits"]
    torch.testing.assert_close(again, wanted[2:], rtol=1e-10, atol=1e-12)


def test_text_is_that_of_whole_passes_and_needs_the_predictor() -> None:
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    stage = model_of()
    generator = Generator([stage], ALONE, stage.spec, torch.device("cpu"))
    found = generator.generate(prompts, 6, Sampling(greedy=True), eod_id=None, seed=7)
    assert found == [greedy_by_whole_passes(stage, prompt, 6) for prompt in prompts]
    assert decoding_notes(stage.spec) == []
    other = model_of(inference="top_k")
    with pytest.raises(ConfigError, match="train with inference=predictor"):
        Generator([other], ALONE, other.spec, torch.device("cpu"))


def test_what_is_reported_makes_sense_to_a_person() -> None:
    block = block_of(inference="top_k")
    _, report = block(draw(2), context([1, 2]))
    layers = {1: {name: value.double() for name, value in report.stats.items()}}
    found = summarise_routing(layers)
    assert found is not None
    assert (found.max_violation, found.drop_rate, found.dead_experts) == (0.0, 0.0, 0)
    assert found.unserved_rate == 1 - 6 / 16
    assert 0.0 < found.entropy < math.log(2)


def decode_on_rank(rank: int, world_size: int, parallel: dict[str, Any]) -> list[list[int]]:
    moe = {**DEPTHS, "allow_noncausal": True, "router_options": {"capacity": "0.5"}}
    run = tiny_run(moe, {"qk_layernorm": "head"}, parallel)
    state = ParallelState.distributed(grid_of(run, world_size))
    return generator_of(run, state).generate(
        [[3, 1, 4, 1, 5], [9, 2, 6]], 6, Sampling(greedy=True), eod_id=None, seed=7
    )


@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_ranks_decode_what_one_process_does(size: str) -> None:
    stage = model_of()
    wanted = [greedy_by_whole_passes(stage, prompt, 6) for prompt in ([3, 1, 4, 1, 5], [9, 2, 6])]
    assert run_on_ranks(2, decode_on_rank, {size: 2}) == [wanted, wanted]


def test_a_dense_spec_and_the_cost_of_a_block() -> None:
    config = tiny_config({**DEPTHS, "router_options": {"capacity": "1"}}, {}, {})
    dense = tiny_config({"num_experts": 0}, {}, {})
    assert isinstance(build_block(gpt_spec(config, VOCAB).layers[0], ALONE), TransformerLayer)
    # all tokens chosen cost what a dense block costs; half of them less than half of two blocks in four
    assert flops_per_token(config, VOCAB) == flops_per_token(dense, VOCAB)
    half = tiny_config({**DEPTHS, "router_options": {"capacity": "0.5"}}, {}, {})
    assert 0.6 < flops_per_token(half, VOCAB) / flops_per_token(dense, VOCAB) < 0.9
