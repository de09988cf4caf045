"""Tokens to rows in another order, and weighted answers home again. Every sum has one order: gathers, no atomics."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class Copies:
    """Which token each of R rows is a copy of; a token may have any number of copies, also none."""

    token_ids: Tensor  # (R,)
    by_token: Tensor  # (R,) the rows, token after token
    starts: Tensor  # (T,) where in by_token each token's rows begin


def copies_of(token_ids: Tensor, num_tokens: int) -> Copies:
    """Sorts the rows by token: token_ids (R,) int64 below num_tokens."""
    sorted_ids, by_token = token_ids.sort(stable=True)
    tokens = torch.arange(num_tokens, device=token_ids.device)
    return Copies(token_ids, by_token, torch.searchsorted(sorted_ids, tokens))


def _sum_copies(rows: Tensor, by_token: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ weight · row over each token's copies: rows (R, H) wide, weights (R,) of that dtype, None = 1 -> (T, H)."""
    if weights is not None:
        weights = weights.index_select(0, by_token)
    return F.embedding_bag(by_token, rows.contiguous(), starts, mode="sum", per_sample_weights=weights)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(copies.by_token, copies.starts)
        return tokens.index_select(0, copies.token_ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # the CPU's bag of bfloat16 rounds ties away from zero
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return _sum_copies(wide, *ctx.saved_tensors).to(grad.dtype), None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, answers: Tensor, weights: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(answers, weights, copies.token_ids)
        # detached: else the bag prepares a backward pass of its own
        wide = answers.detach().to(weights.dtype)
        return _sum_copies(wide, copies.by_token, copies.starts, weights.detach()).to(answers.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        answers, weights, token_ids = ctx.saved_tensors
        rows = grad.to(weights.dtype).index_select(0, token_ids)
        weights_grad = (answers * rows).sum(dim=1) if ctx.needs_input_grad[1] else None
        return rows.mul_(weights[:, None]).to(answers.dtype), weights_grad, None


def permute(tokens: Tensor, copies: Copies) -> Tensor:
    """(T, H) -> (R, H): each row's token."""
    rows: Tensor = _Permute.apply(tokens, copies)
    return rows


def combine(answers: Tensor, weights: Tensor, copies: Copies) -> Tensor:
    """Σ weight · answer over each token's copies, summed in the dtype of the weights.

    answers: (R, H).   weights: (R,), at least as wide.   Returns (T, H) in the answers' dtype, zeros for no copy.
    """
    total: Tensor = _Combine.apply(answers, weights, copies)
    return total
