"""The product that can hand its weight gradient over, and where that goes."""

import pytest
import torch
from torch.nn import functional as F

from megatron_moe.layers.embedding import VocabularyEmbedding
from megatron_moe.layers.linear import linear
from megatron_moe.layers.mlp import MLP
from megatron_moe.layers.weight_gradients import Deferred, Immediate, WeightGradients, collect_small_gradients
from megatron_moe.ops.activation import ACTIVATIONS
from megatron_moe.parallel.state import ParallelState
from tests.layers.contexts import context, make, wide_sum

ALONE = ParallelState.alone()


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64))


def test_is_the_product_with_the_flattened_weight() -> None:
    rows, weight = tensors()
    torch.testing.assert_close(linear(rows, weight, 10, None), F.linear(rows, weight.view(10, 3)))
    assert torch.autograd.gradcheck(
        lambda a, b: linear(a, b, 10, None), (rows.requires_grad_(), weight.requires_grad_())
    )


@pytest.mark.parametrize("wide", [torch.float64, torch.float32])
@pytest.mark.parametrize("make_sink", [Immediate, Deferred])
def test_a_sink_adds_up_what_autograd_would_have_returned(make_sink: type[WeightGradients], wide: torch.dtype) -> None:
    rows, weight = tensors()
    rows, weight = rows.float().requires_grad_(), weight.float().requires_grad_()
    linear(rows, weight, 10, None).square().sum().backward()
    assert weight.grad is not None and rows.grad is not None
    wanted_weight, wanted_rows = weight.grad.clone(), rows.grad.clone()
    weight.grad = rows.grad = None
    weight.main_grad = torch.zeros_like(weight, dtype=wide)  # type: ignore[attr-defined]
    sink = make_sink()
    for _ in range(2):
        linear(rows, weight, 10, sink).square().sum().backward()
    if isinstance(sink, Deferred):
        assert not wide_sum(weight).any()
        sink.run()
        sink.run()  # the work is done once
    assert weight.grad is None
    torch.testing.assert_close(wide_sum(weight), (2 * wanted_weight).to(wide))
    torch.testing.assert_close(rows.grad, 2 * wanted_rows)


def test_small_gradients_move_into_the_wide_sum() -> None:
    module = make(torch.nn.Module(), ALONE)
    module.weight = torch.nn.Parameter(torch.ones(3))
    module.weight.main_grad = torch.ones(3, dtype=torch.float64)  # type: ignore[attr-defined]
    collect_small_gradients(module)
    for _ in range(2):
        (module.weight * torch.arange(3.0)).sum().backward()
    assert module.weight.grad is None
    assert wide_sum(module.weight).tolist() == [1.0, 3.0, 5.0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_feed_forward_layer_by_its_formula(activation: str) -> None:
    described = MLP(3, 4, activation, ALONE.tp, init_std=1.0, output_std=1.0, dtype=torch.float64)
    module, hidden = make(described, ALONE), torch.randn(5, 2, 3, dtype=torch.float64)
    inner = torch.stack([hidden @ branch.t() for branch in module.w1], dim=-2)
    wanted = ACTIVATIONS[activation][1](inner) @ module.w2.t()
    torch.testing.assert_close(module(hidden, context(5, 2, ALONE)), wanted)


@pytest.mark.parametrize("make_sink", [None, Immediate, Deferred])
def test_the_embedding_looks_rows_up_and_adds_their_gradients(make_sink: type[WeightGradients] | None) -> None:
    module = make(VocabularyEmbedding(11, 3, ALONE.tp, std=1.0, tied=False, dtype=torch.float64), ALONE)
    sink = None if make_sink is None else make_sink()
    ctx = context(8, 2, ALONE, sink=sink)  # 16 tokens of 11 ids: some twice
    found = module(ctx)
    tokens = ctx.view.tokens
    assert torch.equal(found, module.weight[tokens])
    probe = torch.randn(8, 2, 3, dtype=torch.float64)
    found.backward(probe)
    if isinstance(sink, Deferred):
        sink.run()
    wanted = torch.zeros(11, 3, dtype=torch.float64)
    for row in range(8):
        for sample in range(2):
            wanted[tokens[row, sample]] += probe[row, sample]
    torch.testing.assert_close(module.weight.grad if sink is None else wide_sum(module.weight), wanted)
