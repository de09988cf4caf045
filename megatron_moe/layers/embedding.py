"""Vocabulary in, vocabulary out: both split by rows of the vocabulary over tp."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.linear import linear
from megatron_moe.layers.parallel_linear import leave_parallel
from megatron_moe.layers.weight_gradients import WeightGradients
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import Axis


class _LookUp(Function):
    """Rows of the weight; ids outside it give zeros."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, inside: Tensor, sink: WeightGradients | None) -> Tensor:
        ctx.save_for_backward(weight, ids, inside)
        ctx.sink = sink
        return weight[ids] * inside[..., None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        weight, ids, inside = ctx.saved_tensors
        rows = (grad * inside[..., None]).reshape(-1, grad.shape[-1])
        flat = ids.reshape(-1)

        def accumulate(total: Tensor) -> None:
            total.index_add_(0, flat, rows.to(total.dtype))

        if ctx.sink is None:
            # a token that comes often is a long sum
            total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            accumulate(total)
            return total.to(weight.dtype), None, None, None
        ctx.sink.add(weight, accumulate)
        return None, None, None, None


def vocabulary_weight(
    size: int, hidden_size: int, tp: Axis, *, std: float, tied: bool, dtype: torch.dtype
) -> nn.Parameter:
    """(V/tp, H). tied: the same logical tensor also stands at the pipeline's other end, and gradients are summed."""
    sums = ("embedding",) if tied else ()
    return new_parameter(
        ParamLayout((size, hidden_size), splits={0: "tp"}, sum_over=sums, init=Init(std=std)), tp, dtype=dtype
    )


class VocabularyEmbedding(nn.Module):
    """Token ids to hidden states; also holds the weight that a tied head uses."""

    def __init__(self, size: int, hidden_size: int, tp: Axis, *, std: float, tied: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.tp = tp
        self.weight = vocabulary_weight(size, hidden_size, tp, std=std, tied=tied, dtype=dtype)

    def forward(self, ctx: ForwardContext) -> Tensor:
        """Returns (S/(cp·tp), B, H) under sequence parallelism, else (S/cp, B, H)."""
        tokens = ctx.view.tokens[ctx.view.rows]
        local = self.weight.shape[0]
        ids = tokens - self.tp.rank * local
        inside = (ids >= 0) & (ids < local)
        partial: Tensor = _LookUp.apply(self.weight, ids.where(inside, 0), inside, ctx.weight_gradients)
        return leave_parallel(partial, ctx.split_over(self.tp))


class VocabularyHead(nn.Module):
    """Hidden states to logits (S/cp, B, V/tp), never gathered."""

    def __init__(self, size: int, hidden_size: int, tp: Axis, *, std: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = vocabulary_weight(size, hidden_size, tp, std=std, tied=False, dtype=dtype)


def project_to_vocabulary(hidden: Tensor, weight: Tensor, ctx: ForwardContext) -> Tensor:
    """(..., H), whole on each rank of tp -> logits (..., V/tp) with a weight (V/tp, H), tied or not."""
    return linear(hidden, weight, weight.shape[0], ctx.weight_gradients)
