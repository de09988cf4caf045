"""A product with another weight for each run of rows: the experts' arithmetic, without padding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Accumulate = Callable[[Tensor], None]
Sink = Callable[[Tensor, Accumulate], None]  # takes a weight and what adds its gradient to a wide total


def loop_product(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """The reference: rows (R, K) in runs of counts[e], weight (e, O, K) -> (R, O). Runs anywhere, any dtype."""
    out = rows.new_empty((rows.shape[0], weight.shape[1]))
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(rows[start : start + count], weight[expert].t(), out=out[start : start + count])
        start += count
    return out


def native_product(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """torch's grouped product (CUTLASS on Hopper): same meaning as loop_product."""
    ends = torch.tensor(counts, dtype=torch.int32, device=rows.device).cumsum(0, dtype=torch.int32)
    out: Tensor = torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return out


def _has_native(rows: Tensor, weight: Tensor) -> bool:
    """torch's kernel wants bf16 on a GPU, and strides that are multiples of 16 bytes."""
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    return rows.is_cuda and rows.dtype == torch.bfloat16 and aligned and rows.shape[0] > 0


def product(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """The fastest implementation that can take these tensors."""
    return (native_product if _has_native(rows, weight) else loop_product)(rows, weight, counts)


def _weight_gradient(total: Tensor, grad: Tensor, rows: Tensor, counts: list[int]) -> None:
    """Add grad_e^T · rows_e to total[e] for each run."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            run = slice(start, start + count)
            if total.dtype == grad.dtype:
                total[expert].addmm_(grad[run].t(), rows[run])
            else:
                total[expert].add_(grad[run].t() @ rows[run])
        start += count


class _Grouped(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, out_features: int, counts: list[int], sink: Sink | None
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.out_features, ctx.counts, ctx.sink = out_features, counts, sink
        # what recomputation saves again has lost its attributes, and with them the sum that gradients go to
        ctx.parameter = weight
        return product(rows, weight.view(weight.shape[0], out_features, -1), counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, weight = ctx.saved_tensors
        counts, flat_shape = ctx.counts, (weight.shape[0], ctx.out_features, rows.shape[-1])
        grad = grad.contiguous()
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = product(grad, weight.view(flat_shape).transpose(1, 2), counts)
        if not ctx.needs_input_grad[1]:
            return grad_rows, None, None, None, None

        def accumulate(total: Tensor) -> None:
            _weight_gradient(total.view(flat_shape), grad, rows, counts)

        if ctx.sink is None:
            total = torch.zeros_like(weight)
            accumulate(total)
            return grad_rows, total, None, None, None
        ctx.sink(ctx.parameter, accumulate)
        return grad_rows, None, None, None, None


def grouped_linear(
    rows: Tensor, weight: Tensor, out_features: int, counts: list[int], sink: Sink | None = None
) -> Tensor:
    """rows (R, K), sorted in runs of counts[e]; weight (e, ...) flattening to (e, O, K). Returns (R, O).

    With a sink the weight gradient is handed over instead of being returned to autograd.
    """
    out: Tensor = _Grouped.apply(rows, weight, out_features, counts, sink)
    return out
