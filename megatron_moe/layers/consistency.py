"""How far two predictions of the same token are apart, over a vocabulary that is split over tp."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_moe.parallel.collectives import sum_over
from megatron_moe.parallel.state import Axis


def _log_softmax(logits: Tensor, padded: slice, tp: Axis) -> Tensor:
    """Wide log-probabilities of this rank's columns; those that only pad the vocabulary take none."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    wide[..., padded] = -torch.inf
    highest = tp.comm.all_reduce_(wide.amax(dim=-1), "max")
    wide.sub_(highest[..., None])
    return wide.sub_(sum_over(wide.exp().sum(dim=-1), tp).log_()[..., None])


class _SymmetricDivergence(Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, vocab_size: int, tp: Axis) -> Tensor:
        padded = slice(max(0, vocab_size - tp.rank * first.shape[-1]), None)
        log_p, log_q = _log_softmax(first, padded, tp), _log_softmax(second, padded, tp)
        gap = log_p - log_q
        gap[..., padded] = 0.0  # -inf less -inf
        p, q = log_p.exp_(), log_q.exp_()
        # KL(p||q) and KL(q||p)
        both = sum_over(torch.stack([(p * gap).sum(dim=-1), -(q * gap).sum(dim=-1)]), tp)
        ctx.save_for_backward(p, q, gap, both)
        ctx.dtype = first.dtype
        return 0.5 * both.sum(dim=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        p, q, gap, (forth, back) = ctx.saved_tensors
        half = 0.5 * grad[..., None]
        # d KL(p||q) / d first = p (gap - KL(p||q)),  d KL(q||p) / d first = p - q;  and with the roles exchanged
        to_first = half * (p * (gap - forth[..., None]) + (p - q))
        to_second = half * (q * (-gap - back[..., None]) + (q - p))
        return to_first.to(ctx.dtype), to_second.to(ctx.dtype), None, None


def symmetric_divergence(first: Tensor, second: Tensor, vocab_size: int, tp: Axis) -> Tensor:
    """(KL(p||q) + KL(q||p)) / 2 of each token, p and q the softmax of the two logits.  [THOR, arXiv:2110.04260]

    first, second: (..., V/tp), this rank's columns.   Returns (...) wide in nats, the same on all ranks of tp; the
    gradient reaches both.   Columns from vocab_size on are padding and take no probability.
    """
    found: Tensor = _SymmetricDivergence.apply(first, second, vocab_size, tp)
    return found
