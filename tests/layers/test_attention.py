"""Attention against loops over samples, heads, queries and keys."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_moe.layers.attention import Attention, AttentionShape
from megatron_moe.layers.attention_core import GatheredAttention
from megatron_moe.layers.weight_gradients import Deferred
from megatron_moe.parallel.state import ParallelState
from tests.layers.contexts import context, make, wide_sum

ALONE = ParallelState.alone()
Array = NDArray[np.float64]
S, B, H, HEADS, GROUPS, WIDTH = 6, 2, 7, 4, 2, 6
EPSILON = 1e-3
SEGMENTS = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 1], [1, -1], [1, -1]], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 0], [1, 1], [2, 0], [0, 1], [1, 0], [2, 0]])


def shape(**changes: object) -> AttentionShape:
    values: dict[str, object] = {
        "hidden_size": H,
        "num_heads": HEADS,
        "num_groups": GROUPS,
        "head_dim": WIDTH,
        "causal": True,
        "rotary_width": 4,
        "rotary_base": 100.0,
        "qk_norm": "none",
        "norm_epsilon": EPSILON,
        "init_std": 0.5,
        "output_std": 0.5,
    }
    return AttentionShape(**{**values, **changes})  # type: ignore[arg-type]


def layer(described: AttentionShape) -> Attention:
    module = make(Attention(0, described, ALONE.tp, GatheredAttention(ALONE.cp), dtype=torch.float64), ALONE)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randn_like(parameter))
    return module


def rms(vector: Array, weight: Array) -> Array:
    scaled: Array = vector / math.sqrt(float((vector**2).mean()) + EPSILON) * weight
    return scaled


def turned(vector: Array, position: int, width: int, base: float) -> Array:
    out = vector.copy()
    for pair in range(width // 2):
        angle = position * base ** (-2.0 * pair / width)
        first, second = vector[pair], vector[pair + width // 2]
        out[pair] = first * math.cos(angle) - second * math.sin(angle)
        out[pair + width // 2] = second * math.cos(angle) + first * math.sin(angle)
    return out


def heads_of(module: Attention, row: Array, position: int) -> tuple[Array, Array, Array]:
    """Queries (heads, D), keys (groups, D) and values (groups, D) of one token."""
    described, q = module.shape, module.per_group
    qkv = np.einsum("gjdh,h->gjd", module.qkv.detach().numpy(), row)
    queries, keys, values = qkv[:, :q], qkv[:, q : q + 1], qkv[:, q + 1]
    if described.qk_norm != "none":
        weights = [module.get_parameter(f"{name}.weight").detach().numpy() for name in ("q_norm", "k_norm")]
        if described.qk_norm == "projection":
            queries, keys = rms(queries, weights[0]), rms(keys, weights[1])
        else:
            queries = np.array([[rms(head, weights[0]) for head in group] for group in queries])
            keys = np.array([[rms(head, weights[1]) for head in group] for group in keys])
    turn = [
        np.array([turned(head, position, described.rotary_width, described.rotary_base) for head in part])
        for part in (queries.reshape(-1, described.head_dim), keys.reshape(-1, described.head_dim))
    ]
    return turn[0], turn[1], values


def slow_attention(module: Attention, hidden: Array, positions: Array, segments: Array) -> Array:
    """One sample after another, one query after another; head n looks at key-value head n // (heads per group)."""
    out = np.zeros_like(hidden)
    for sample in range(hidden.shape[1]):
        tokens = [heads_of(module, hidden[s, sample], int(positions[s, sample])) for s in range(hidden.shape[0])]
        for row, (queries, _, _) in enumerate(tokens):
            seen = [
                s
                for s in range(len(tokens))
                if segments[s, sample] == segments[row, sample] and (s <= row or not module.shape.causal)
            ]
            for head, query in enumerate(queries):
                group, within = divmod(head, module.per_group)
                scores = np.array([query @ tokens[s][1][group] / math.sqrt(module.shape.head_dim) for s in seen])
                share = np.exp(scores - scores.max())
                mixed = sum(p * tokens[s][2][group] for p, s in zip(share / share.sum(), seen, strict=True))
                out[row, sample] += module.output.detach().numpy()[:, group, within] @ mixed
    return out


VARIANTS = {
    "grouped": {},
    "one key-value head for all": {"num_groups": 1},
    "one for each query head": {"num_groups": HEADS},
    "no rotary": {"rotary_width": 0},
    "all of the head turns": {"rotary_width": WIDTH},
    "not causal": {"causal": False},
    "norm of each head": {"qk_norm": "head"},
    "norm of the projection": {"qk_norm": "projection"},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_agrees_with_slow_loops(changes: dict[str, object], packed: bool) -> None:
    torch.manual_seed(0)
    module, hidden = layer(shape(**changes)), torch.randn(S, B, H, dtype=torch.float64)
    given = {"segments": SEGMENTS, "positions": POSITIONS} if packed else {}
    ctx = context(S, B, ALONE, **given)  # type: ignore[arg-type]
    wanted = slow_attention(module, hidden.numpy(), ctx.view.positions.numpy(), ctx.view.segments.numpy())
    np.testing.assert_allclose(module(hidden, ctx).detach().numpy(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("qk_norm", ["none", "head", "projection"])
def test_gradient(qk_norm: str) -> None:
    module = layer(shape(qk_norm=qk_norm))
    hidden = torch.randn(3, 1, H, dtype=torch.float64, requires_grad=True)
    ctx = context(3, 1, ALONE)
    assert torch.autograd.gradcheck(lambda rows, *weights: module(rows, ctx), (hidden, *module.parameters()))


def test_the_future_and_other_documents_are_not_seen() -> None:
    module, hidden = layer(shape()), torch.randn(S, B, H, dtype=torch.float64)
    ctx = context(S, B, ALONE, segments=SEGMENTS, positions=POSITIONS)
    before = module(hidden, ctx)
    changed = hidden.clone()
    changed[3, 0] += 1.0  # the first token of the second document of sample 0
    differs = (module(changed, ctx) - before).abs().amax(-1) > 0
    assert differs.tolist() == [[False, False]] * 3 + [[True, False]] * 3


def test_a_sink_is_given_both_weight_gradients() -> None:
    module, hidden = layer(shape()), torch.randn(S, B, H, dtype=torch.float64)
    module(hidden, context(S, B, ALONE)).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = None
    sink = Deferred()
    module(hidden, context(S, B, ALONE, sink=sink)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None and not wide_sum(parameter).any(), name
    sink.run()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(wide_sum(parameter), wanted[name], rtol=1e-12, atol=1e-12)
