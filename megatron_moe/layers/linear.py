"""Products with a weight, split over tensor-parallel ranks by columns or rows."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_moe.layers.weight_gradients import WeightGradients
from megatron_moe.parallel.collectives import copy_to, gather_for_partial, reduce_from, reduce_scatter, shares
from megatron_moe.parallel.state import Axis


class _Linear(Function):
    """input (..., K) times weight viewed as (O, K)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, out_features: int, sink: WeightGradients | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.out_features, ctx.sink = out_features, sink
        # what recomputation saves again has lost its attributes, and with them the sum that gradients go to
        ctx.parameter = weight
        return torch.nn.functional.linear(input, weight.view(out_features, -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input, weight = ctx.saved_tensors
        flat_weight = weight.view(ctx.out_features, -1)
        grad_input = grad @ flat_weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_input, None, None, None
        rows, columns = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        if ctx.sink is None:
            return grad_input, (rows.t() @ columns).view(weight.shape), None, None

        def accumulate(total: Tensor) -> None:
            flat = total.view(flat_weight.shape)
            if flat.dtype == rows.dtype:
                flat.addmm_(rows.t(), columns)
            else:
                flat.add_(rows.t() @ columns)

        ctx.sink.add(ctx.parameter, accumulate)
        return grad_input, None, None, None


def linear(input: Tensor, weight: Tensor, out_features: int, sink: WeightGradients | None) -> Tensor:
    """input (..., K) -> (..., out_features); the weight may have any shape that flattens to (out_features, K).

    With a sink the weight gradient is handed over instead of being returned to autograd.
    """
    out: Tensor = _Linear.apply(input, weight, out_features, sink)
    return out


def enter_parallel(hidden: Tensor, tp: Axis, rows: int, sequence_parallel: bool) -> Tensor:
    """Hidden as products split by columns need it: whole on each rank, gradients summed over tp.

    hidden: (S/tp, B, H) under sequence parallelism, else (S, B, H).  rows: S of this context-parallel rank.
    """
    if sequence_parallel:
        return gather_for_partial(hidden, tp, shares(rows, tp.size))
    return copy_to(hidden, tp)


def leave_parallel(partial: Tensor, tp: Axis, rows: int, sequence_parallel: bool) -> Tensor:
    """The sum over tp of products split by rows: (S/tp, B, H) under sequence parallelism, else (S, B, H)."""
    if sequence_parallel:
        return reduce_scatter(partial, tp, shares(rows, tp.size))
    return reduce_from(partial, tp)
