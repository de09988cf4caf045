"""Attention to another stream against loops, and what biases and prefixes do to attention."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_moe.layers.attention import AttentionShape
from megatron_moe.layers.attention_core import GatheredAttention, Sight
from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.layers.cross_attention import CrossAttention
from megatron_moe.parallel.state import ParallelState
from tests.layers.contexts import context, make

ALONE = ParallelState.alone()
Array = NDArray[np.float64]
S, SOURCE, B, H, HEADS, GROUPS, WIDTH = 4, 6, 2, 7, 4, 2, 5
SEGMENTS = torch.tensor([[0, 0], [0, 1], [1, 1], [1, -1]], dtype=torch.int32)
SOURCE_SEGMENTS = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 1], [1, 1], [-1, -1]], dtype=torch.int32)


def layer(qk_norm: str = "none") -> CrossAttention:
    shape = AttentionShape(H, HEADS, GROUPS, WIDTH, True, 0, 1e4, qk_norm, 1e-6, 0.5, 0.5)
    return make(CrossAttention(0, shape, ALONE.tp, GatheredAttention(ALONE.cp), dtype=torch.float64), ALONE)


def looking(memory: Tensor, packed: bool) -> ForwardContext:
    mine = context(S, B, ALONE, segments=SEGMENTS if packed else None)
    theirs = context(SOURCE, B, ALONE, segments=SOURCE_SEGMENTS if packed else None)
    return replace(mine, source=theirs.view, memory=memory)


def slow_cross_attention(module: CrossAttention, hidden: Array, memory: Array, packed: bool) -> Array:
    """One sample, one query and one head after another."""
    q, kv, output = (getattr(module, name).detach().numpy() for name in ("q", "kv", "output"))
    out = np.zeros_like(hidden)
    for sample in range(B):
        for row in range(S):
            seen = [s for s in range(SOURCE) if not packed or SOURCE_SEGMENTS[s, sample] == SEGMENTS[row, sample]]
            for group in range(GROUPS):
                keys = [kv[group, 0] @ memory[s, sample] for s in seen]
                values = [kv[group, 1] @ memory[s, sample] for s in seen]
                for within in range(HEADS // GROUPS):
                    query = q[group, within] @ hidden[row, sample]
                    scores = np.array([query @ key / math.sqrt(WIDTH) for key in keys])
                    share = np.exp(scores - scores.max())
                    mixed = sum(p * value for p, value in zip(share / share.sum(), values, strict=True))
                    out[row, sample] += output[:, group, within] @ mixed
    return out


def draw(length: int) -> Tensor:
    return torch.randn(length, B, H, dtype=torch.float64)


@pytest.mark.parametrize("packed", [False, True])
def test_agrees_with_slow_loops(packed: bool) -> None:
    torch.manual_seed(0)
    module, hidden, memory = layer(), draw(S), draw(SOURCE)
    wanted = slow_cross_attention(module, hidden.numpy(), memory.numpy(), packed)
    found = module(hidden, looking(memory, packed)).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("qk_norm", ["none", "head", "projection"])
def test_gradients_reach_weights_and_both_streams(qk_norm: str) -> None:
    torch.manual_seed(1)
    module, hidden, memory = layer(qk_norm), draw(S).requires_grad_(), draw(SOURCE).requires_grad_()

    def call(rows: Tensor, source: Tensor, *weights: Tensor) -> Tensor:
        found: Tensor = module(rows, looking(source, True))
        return found

    assert torch.autograd.gradcheck(call, (hidden, memory, *module.parameters()))


def core_inputs(view: SequenceView) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    shape = (view.length, view.num_samples, GROUPS)
    double = torch.float64
    return (
        torch.randn(*shape, HEADS // GROUPS, WIDTH, dtype=double),
        torch.randn(*shape, WIDTH, dtype=double),
        torch.randn(*shape, WIDTH, dtype=double),
    )


def slow_core(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor) -> Tensor:
    """allowed (B, S, S) bool, bias (heads, S, S)."""
    scores = torch.einsum("sbgqd,tbgd->bgqst", query, key) / math.sqrt(WIDTH)
    scores = scores + bias.view(GROUPS, HEADS // GROUPS, *bias.shape[1:])
    weights = scores.masked_fill(~allowed[:, None, None], -math.inf).softmax(dim=-1)
    return torch.einsum("bgqst,tbgd->sbgqd", weights, value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bias_is_added_to_the_scores_of_visible_keys(causal: bool, packed: bool) -> None:
    view = context(S, B, ALONE, segments=SEGMENTS if packed else None).view
    bias = torch.randn(1, HEADS, S, S, dtype=torch.float64, requires_grad=True)
    given = core_inputs(view)
    documents = view.segments.t()
    allowed = documents[:, :, None] == documents[:, None, :]
    if causal:
        allowed = allowed & torch.ones(S, S, dtype=torch.bool).tril()
    found = GatheredAttention(ALONE.cp)(*given, Sight(view, view, causal, bias))
    wanted = slow_core(*given, allowed, bias[0])
    torch.testing.assert_close(found, wanted)
    cotangent = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * cotangent).sum(), bias)[0] for out in (found, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("packed", [False, True])
def test_a_prefix_is_seen_by_its_whole_document_and_by_no_other(packed: bool) -> None:
    view = context(S, B, ALONE, segments=SEGMENTS if packed else None).view
    prefix = torch.tensor([[True, True], [True, False], [False, False], [False, False]])
    if packed:
        prefix[2, 0] = True  # the first token of the second document
    view = replace(view, prefix=prefix)
    documents = view.segments.t()
    allowed = torch.zeros(B, S, S, dtype=torch.bool)
    for sample in range(B):
        for row in range(S):
            for column in range(S):
                same = bool(documents[sample, row] == documents[sample, column])
                allowed[sample, row, column] = same and (column <= row or bool(prefix[column, sample]))
    given = core_inputs(view)
    found = GatheredAttention(ALONE.cp)(*given, Sight(view, view, causal=True))
    torch.testing.assert_close(found, slow_core(*given, allowed, torch.zeros(HEADS, S, S, dtype=torch.float64)))
    assert not torch.equal(found, GatheredAttention(ALONE.cp)(*given, Sight(replace(view, prefix=None), view, False)))
