"""Products whose weight is split over tensor-parallel ranks by columns or by rows, and the collectives beside them.

With overlap, collectives travel while products are made (as Megatron's --tp-comm-overlap does), of the same numbers:

    by columns, forward    rows of the others arrive while those that are there are multiplied
    by columns, backward   the input arrives again while its gradient is made; that is summed, rank by rank, while the
                           next rank's rows of it and then the weight gradient are made
    by rows, forward       the sum of one rank's rows travels while those of the next are multiplied
    by rows, backward      as by columns, forward; then the weight gradient

Without, a collective is waited for before or after the whole product, and the gathered input is kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_moe.layers.linear import linear, weight_gradient
from megatron_moe.layers.weight_gradients import WeightGradients
from megatron_moe.parallel.arrival import Arrival, Landed
from megatron_moe.parallel.collectives import copy_to, gather_for_partial, reduce_from, reduce_scatter, shares
from megatron_moe.parallel.in_pieces import places, rows_as_they_come, start_split_sum, start_whole_sum
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class TensorSplit:
    """How the ranks of tp share the products of one pass."""

    tp: Axis
    rows: int  # S of this context-parallel rank
    sequence_parallel: bool  # hidden is (S/tp, B, H), else (S, B, H) on each rank
    overlap: bool  # of collectives with products

    @property
    def shares(self) -> list[int]:
        """Rows of hidden on each rank under sequence parallelism."""
        return shares(self.rows, self.tp.size)


def enter_parallel(hidden: Tensor, split: TensorSplit) -> Tensor:
    """Hidden as products split by columns need it: whole on each rank, gradients summed over tp.

    hidden: (S/tp, B, H) under sequence parallelism, else (S, B, H).
    """
    if split.sequence_parallel:
        return gather_for_partial(hidden, split.tp, split.shares)
    return copy_to(hidden, split.tp)


def leave_parallel(partial: Tensor, split: TensorSplit) -> Tensor:
    """The sum over tp of products split by rows: (S/tp, B, H) under sequence parallelism, else (S, B, H)."""
    if split.sequence_parallel:
        return reduce_scatter(partial, split.tp, split.shares)
    return reduce_from(partial, split.tp)


def column_linear(
    hidden: Tensor, weight: Tensor, out_features: int, split: TensorSplit, sink: WeightGradients | None
) -> Tensor:
    """hidden as enter_parallel takes it -> (S, B, out_features), this rank's columns.

    The weight may have any shape that flattens to (out_features, H).
    """
    if not split.overlap:
        return linear(enter_parallel(hidden, split), weight, out_features, sink)
    out: Tensor = _ColumnLinear.apply(hidden, weight, out_features, split, sink)
    return out


def row_linear(
    inner: Tensor, weight: Tensor, out_features: int, split: TensorSplit, sink: WeightGradients | None
) -> Tensor:
    """inner (S, B, K), this rank's columns -> the sum over tp as leave_parallel gives it, out_features wide.

    The weight may have any shape that flattens to (out_features, K).
    """
    if not split.overlap:
        return leave_parallel(linear(inner, weight, out_features, sink), split)
    out: Tensor = _RowLinear.apply(inner, weight, out_features, split, sink)
    return out


Gradients = tuple[Tensor | None, Tensor | None, None, None, None]


class _ColumnLinear(Function):
    """Keeps this rank's rows of hidden only."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, out_features: int, split: TensorSplit, sink: WeightGradients | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.out_features, ctx.split, ctx.sink = out_features, split, sink
        # what recomputation saves again has lost its attributes, and with them the sum that gradients go to
        ctx.parameter = weight
        out = hidden.new_empty((split.rows, *hidden.shape[1:-1], out_features))
        _multiply_all(hidden, weight.view(out_features, -1).t(), out, split)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        hidden, weight = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        gathering = _start_gather(hidden, ctx.split) if wants_weight else None
        flat_weight = weight.view(ctx.out_features, -1)
        summing = _start_sum_of_product(grad, flat_weight, ctx.split) if wants_hidden else None
        grad_weight = None if gathering is None else weight_gradient(ctx.parameter, grad, gathering.wait, ctx.sink)
        return None if summing is None else summing.wait(), grad_weight, None, None, None


class _RowLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, inner: Tensor, weight: Tensor, out_features: int, split: TensorSplit, sink: WeightGradients | None
    ) -> Tensor:
        ctx.save_for_backward(inner, weight)
        ctx.out_features, ctx.split, ctx.sink = out_features, split, sink
        ctx.parameter = weight
        return _start_sum_of_product(inner, weight.view(out_features, -1).t(), split).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        inner, weight = ctx.saved_tensors
        grad_inner = torch.empty_like(inner, memory_format=torch.contiguous_format)
        whole = _multiply_all(grad, weight.view(ctx.out_features, -1), grad_inner, ctx.split)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            whole_grad = whole[0] if len(whole) == 1 else torch.cat(whole)
            grad_weight = weight_gradient(ctx.parameter, whole_grad, lambda: inner, ctx.sink)
        return grad_inner, grad_weight, None, None, None


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left (..., K) times right (K, N), written into out (..., N)."""
    torch.mm(left.reshape(-1, left.shape[-1]), right, out=out.view(-1, out.shape[-1]))
    return out


def _multiply_all(own: Tensor, right: Tensor, out: Tensor, split: TensorSplit) -> list[Tensor]:
    """Fill out (S, B, N) with the product of all rows and right (K, N); returns those rows, share by share.

    own: (S/tp, B, K) under sequence parallelism, else (S, B, K).
    """
    if not split.sequence_parallel:
        _multiply(own, right, out)
        return [own]
    parts = places(split.shares)
    found = {}
    for rank, rows in rows_as_they_come(own, split.tp, split.shares):
        _multiply(rows, right, out[parts[rank]])
        found[rank] = rows
    return [found[rank] for rank in range(split.tp.size)]


def _start_gather(hidden: Tensor, split: TensorSplit) -> Arrival:
    """hidden as enter_parallel takes it, whole."""
    if split.sequence_parallel:
        return split.tp.comm.start_all_gather(hidden, split.shares)
    return Landed(hidden)


def _start_sum_of_product(left: Tensor, right: Tensor, split: TensorSplit) -> Arrival:
    """The sum over tp of left (S, B, K) times right (K, N), as leave_parallel gives it."""
    shape = (*left.shape[1:-1], right.shape[1])
    if split.sequence_parallel:
        return start_split_sum(
            lambda part: _multiply(left[part], right, left.new_empty((part.stop - part.start, *shape))),
            split.tp,
            split.shares,
        )
    out = left.new_empty((split.rows, *shape))
    return start_whole_sum(out, lambda part: _multiply(left[part], right, out[part]), split.tp)
