"""Collectives with their gradients, and how rows are shared out. The only place that may ask for an axis' size.

A *partial* tensor must still be summed over the axis; a *replicated* one is the same on all its ranks; a *split* one
is cut along dim 0. Each function below names what it turns into what; its backward is the adjoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_moe.parallel.arrival import Arrival, Landed
from megatron_moe.parallel.state import Axis


def shares(total: int, size: int) -> list[int]:
    """Rows of each rank when `total` rows are split as evenly as possible; the first ranks take one more."""
    quotient, rest = divmod(total, size)
    return [quotient + (rank < rest) for rank in range(size)]


def own_rows(tensor: Tensor, axis: Axis) -> Tensor:
    """The rows of a replicated tensor that fall to this rank."""
    rows = shares(tensor.shape[0], axis.size)
    start = sum(rows[: axis.rank])
    return tensor[start : start + rows[axis.rank]]


def gather_rows(tensor: Tensor, axis: Axis, total: int) -> Tensor:
    """All ranks' rows, without gradient; `total` rows split as `shares` does."""
    return axis.comm.all_gather(tensor, shares(total, axis.size))


def gather_counts(count: int, axis: Axis, device: torch.device) -> list[int]:
    """What each rank of the axis passes in; waits for the device."""
    if axis.size == 1:
        return [count]
    mine = torch.tensor([count], dtype=torch.int64, device=device)
    found: list[int] = axis.comm.all_gather(mine, [1] * axis.size).tolist()
    return found


def sum_over(tensor: Tensor, axis: Axis) -> Tensor:
    """Sum over the ranks, without gradient; the argument is kept."""
    return axis.comm.all_reduce_(tensor.clone()) if axis.size > 1 else tensor


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(grad, ctx.axis), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return axis.comm.all_reduce_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.total = axis, tensor.shape[0]
        return own_rows(tensor, axis).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grad, ctx.axis, ctx.total), None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, total: int) -> Tensor:
        ctx.axis = axis
        return gather_rows(tensor, axis, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return own_rows(grad, ctx.axis).clone(), None, None


class _GatherPartial(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, rows: Sequence[int]) -> Tensor:
        ctx.axis, ctx.rows = axis, rows
        return axis.comm.all_gather(tensor, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.comm.reduce_scatter(grad, ctx.rows), None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, rows: Sequence[int]) -> Tensor:
        ctx.axis, ctx.rows = axis, rows
        return axis.comm.reduce_scatter(tensor, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.comm.all_gather(grad, ctx.rows), None, None


@dataclass
class _Journey:
    """What is under way between the two ends of an exchange."""

    send: Sequence[int]
    receive: Sequence[int]
    rows: Arrival = field(default_factory=lambda: Landed(torch.empty(0)))
    gradients: Arrival = field(default_factory=lambda: Landed(torch.empty(0)))


class _Depart(Function):
    """Starts an exchange of rows; waits for that of their gradients. Returns a token that stands for the rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.rows = axis.comm.start_all_to_all(tensor, journey.send, journey.receive)
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.journey.gradients.wait(), None, None


class _Land(Function):
    """Waits for an exchange of rows; starts that of their gradients."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, axis: Axis, journey: _Journey) -> Tensor:
        ctx.axis, ctx.journey = axis, journey
        return journey.rows.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        journey = ctx.journey
        journey.gradients = ctx.axis.comm.start_all_to_all(grad, journey.receive, journey.send)
        return grad.new_empty(0), None, None


def copy_to(tensor: Tensor, axis: Axis) -> Tensor:
    """Replicated -> replicated, used by products whose gradients are partial (Megatron's f)."""
    return _Copy.apply(tensor, axis) if axis.size > 1 else tensor


def reduce_from(tensor: Tensor, axis: Axis) -> Tensor:
    """Partial -> replicated (Megatron's g)."""
    return _Reduce.apply(tensor, axis) if axis.size > 1 else tensor


def split_to(tensor: Tensor, axis: Axis) -> Tensor:
    """Replicated -> split."""
    return _Split.apply(tensor, axis) if axis.size > 1 else tensor


def gather_from(tensor: Tensor, axis: Axis, total: int) -> Tensor:
    """Split -> replicated, consumed the same way on every rank."""
    return _Gather.apply(tensor, axis, total) if axis.size > 1 else tensor


def gather_for_partial(tensor: Tensor, axis: Axis, rows: Sequence[int]) -> Tensor:
    """Split -> whole, consumed differently on every rank, so gradients are partial and summed on the way back."""
    return _GatherPartial.apply(tensor, axis, rows) if axis.size > 1 else tensor


def reduce_scatter(tensor: Tensor, axis: Axis, rows: Sequence[int]) -> Tensor:
    """Partial -> split."""
    return _ReduceScatter.apply(tensor, axis, rows) if axis.size > 1 else tensor


def nothing() -> None:
    """What is done beside an exchange when there is nothing to do."""


def exchange(
    tensor: Tensor,
    axis: Axis,
    send: Sequence[int],
    receive: Sequence[int],
    beside: Callable[[], None] = nothing,
) -> Tensor:
    """send[r] rows to rank r of the axis, receive[r] rows from it.

    beside: is computed while the rows travel, and its backward pass while their gradients do: autograd runs first what
    was made last.
    """
    if axis.size == 1:
        beside()
        return tensor
    journey = _Journey(send, receive)
    token = _Depart.apply(tensor, axis, journey)
    beside()
    landed: Tensor = _Land.apply(token, axis, journey)
    return landed
