"""Rows into expert order and home again. Gathers only, both ways, so that sums have one order (no atomics)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def invert(order: Tensor, size: int) -> Tensor:
    """Where each of `size` items stands in `order` (R,), or R when it is not in it."""
    inverse = torch.full((size,), order.shape[0], dtype=torch.int64, device=order.device)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return inverse


def _take_or_zero(rows: Tensor, places: Tensor) -> Tensor:
    """rows[places], zeros where a place is len(rows)."""
    found = rows.shape[0]
    if found == 0:
        return rows.new_zeros((places.shape[0], *rows.shape[1:]))
    taken = rows[places.clamp(max=found - 1)]
    return taken.masked_fill_((places == found).view(-1, *(1,) * (rows.dim() - 1)), 0)


def _sum_to_tokens(rows: Tensor, token_ids: Tensor, num_tokens: int, choices: int) -> Tensor:
    """(N, H) -> (T, H): add the rows of each token; with `choices` the rows stand token by token, that many each."""
    if choices:
        return rows.view(num_tokens, choices, rows.shape[1]).sum(dim=1)
    return rows.new_zeros((num_tokens, rows.shape[1])).index_add_(0, token_ids, rows)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_ids: Tensor, order: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(token_ids, order)
        ctx.num_tokens, ctx.choices = tokens.shape[0], choices
        return tokens[token_ids[order]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        token_ids, order = ctx.saved_tensors
        rows = _take_or_zero(grad, invert(order, token_ids.shape[0]))
        return _sum_to_tokens(rows, token_ids, ctx.num_tokens, ctx.choices), None, None, None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(order)
        return _take_or_zero(rows, invert(order, size))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order], None, None


def permute(tokens: Tensor, token_ids: Tensor, order: Tensor, choices: int) -> Tensor:
    """tokens (T, H) -> (R, H): the rows of the assignments `order` (R,), whose tokens token_ids (N,) names.

    choices: K when the assignments stand token by token, K each; 0 when they stand anyhow.
    """
    rows: Tensor = _Permute.apply(tokens, token_ids, order, choices)
    return rows


def unpermute(rows: Tensor, order: Tensor, size: int) -> Tensor:
    """(R, H) in the order of the assignments `order` -> (size, H) in the plan's order, zeros where nothing came."""
    home: Tensor = _Unpermute.apply(rows, order, size)
    return home


def combine(home: Tensor, weights: Tensor, token_ids: Tensor, num_tokens: int, choices: int) -> Tensor:
    """Σ weight · answer over each token's assignments, summed wide: home (N, H), weights (N,) -> (T, H)."""
    weighted = home.to(weights.dtype) * weights[:, None]
    if choices:
        total = weighted.view(num_tokens, choices, weighted.shape[1]).sum(dim=1)
    else:
        total = weighted.new_zeros((num_tokens, home.shape[1])).index_add(0, token_ids, weighted)
    return total.to(home.dtype)
