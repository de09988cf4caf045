"""The grouped product against one product for each row, and its gradient with and without a sink."""

import pytest
import torch
from torch import Tensor

from megatron_moe.ops.grouped_gemm import Accumulate, grouped_linear, loop_product

RUNS = [[3, 0, 2, 1], [0, 0, 0, 0], [0, 5, 0, 0], [2, 2, 2, 2]]


def slow_product(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """One row at a time."""
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    out = torch.zeros(len(experts), weight.shape[1], dtype=rows.dtype)
    for place, expert in enumerate(experts):
        for column in range(weight.shape[1]):
            out[place, column] = sum(rows[place, at] * weight[expert, column, at] for at in range(weight.shape[2]))
    return out


def make(counts: list[int], out_features: int = 5, width: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), width, dtype=torch.float64)
    return rows, torch.randn(len(counts), out_features, width, dtype=torch.float64)


class Sink:
    """Keeps the work, as a split backward pass does."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Accumulate]] = []

    def __call__(self, weight: Tensor, accumulate: Accumulate) -> None:
        self.kept.append((weight, accumulate))


@pytest.mark.parametrize("counts", RUNS)
def test_each_run_of_rows_meets_its_own_weight(counts: list[int]) -> None:
    rows, weight = make(counts)
    for found in (loop_product(rows, weight, counts), grouped_linear(rows, weight, 5, counts)):
        torch.testing.assert_close(found, slow_product(rows, weight, counts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", RUNS)
def test_gradient(counts: list[int]) -> None:
    rows, weight = (tensor.requires_grad_() for tensor in make(counts))
    if sum(counts):
        assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, 5, counts), (rows, weight))
    else:
        grouped_linear(rows, weight, 5, counts).sum().backward()
        assert weight.grad is not None and not weight.grad.any()


def test_a_weight_of_more_dimensions_is_flattened_row_by_row() -> None:
    counts = [2, 1]
    rows, weight = make(counts, out_features=4)
    shaped = weight.view(2, 2, 2, 3).requires_grad_()
    found = grouped_linear(rows, shaped, 4, counts)
    torch.testing.assert_close(found, slow_product(rows, weight, counts))
    found.sum().backward()
    assert shaped.grad is not None and shaped.grad.shape == shaped.shape


@pytest.mark.parametrize("counts", RUNS)
def test_a_sink_is_given_what_autograd_would_have_been(counts: list[int]) -> None:
    rows, weight = (tensor.requires_grad_() for tensor in make(counts))
    grad = torch.randn(sum(counts), 5, dtype=torch.float64)
    whole = torch.autograd.grad(grouped_linear(rows, weight, 5, counts), (rows, weight), grad)

    sink = Sink()
    grouped_linear(rows, weight, 5, counts, sink).backward(grad)
    assert weight.grad is None
    assert rows.grad is not None and torch.equal(rows.grad, whole[0])
    ((told, accumulate),) = sink.kept
    assert told is weight
    total = torch.ones_like(weight)  # adds to what is there
    with torch.no_grad():
        accumulate(total)
    torch.testing.assert_close(total, whole[1] + 1)


def test_a_narrow_gradient_adds_to_a_wide_total() -> None:
    counts = [2, 1]
    rows, weight = (tensor.float().requires_grad_() for tensor in make(counts))
    sink = Sink()
    grouped_linear(rows, weight, 5, counts, sink).sum().backward()
    total = torch.zeros(2, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        sink.kept[0][1](total)
    torch.testing.assert_close(total[0], rows[:2].detach().sum(0).double().expand(5, 3))
    torch.testing.assert_close(total[1], rows[2].detach().double().expand(5, 3))


def test_a_frozen_weight_costs_no_gradient() -> None:
    rows, weight = make([2, 1])
    sink = Sink()
    grouped_linear(rows.requires_grad_(), weight, 5, [2, 1], sink).sum().backward()
    assert sink.kept == []
    assert rows.grad is not None
