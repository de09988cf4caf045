"""The product with a weight, which can hand its weight gradient over."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_moe.layers.weight_gradients import WeightGradients


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
        grad_input = grad @ weight.view(ctx.out_features, -1) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_input, None, None, None
        return grad_input, weight_gradient(ctx.parameter, grad, lambda: input, ctx.sink), None, None


def weight_gradient(
    parameter: Tensor, grad: Tensor, input: Callable[[], Tensor], sink: WeightGradients | None
) -> Tensor | None:
    """Of a product: grad (..., O), transposed, times input (..., K), in the parameter's shape; None = the sink has it.

    input: gives the tensor, once it is needed; called once.
    """
    rows = grad.reshape(-1, grad.shape[-1])

    def columns() -> Tensor:
        whole = input()
        return whole.reshape(-1, whole.shape[-1])

    if sink is None:
        return (rows.t() @ columns()).view(parameter.shape)

    def accumulate(total: Tensor) -> None:
        flat = total.view(rows.shape[1], -1)
        if flat.dtype == rows.dtype:
            flat.addmm_(rows.t(), columns())
        else:
            flat.add_(rows.t() @ columns())

    sink.add(parameter, accumulate)
    return None


def linear(input: Tensor, weight: Tensor, out_features: int, sink: WeightGradients | None) -> Tensor:
    """input (..., K) -> (..., out_features); the weight may have any shape that flattens to (out_features, K).

    With a sink the weight gradient is handed over instead of being returned to autograd.
    """
    out: Tensor = _Linear.apply(input, weight, out_features, sink)
    return out
