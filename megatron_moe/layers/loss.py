"""Cross-entropy of each token over a vocabulary that is split over tp; logits are never gathered."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_moe.parallel.collectives import sum_over
from megatron_moe.parallel.state import Axis


class _VocabularyCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, tp: Axis) -> Tensor:
        local = logits.shape[-1]
        start = tp.rank * local
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        # rows that only pad the vocabulary take no probability
        wide[..., max(0, vocab_size - start) :] = -torch.inf
        highest = tp.comm.all_reduce_(wide.amax(dim=-1), "max")
        wide = wide.sub_(highest[..., None]).exp_()
        ids = labels - start
        inside = (ids >= 0) & (ids < local)
        ids = ids.where(inside, 0)
        chosen = logits.gather(-1, ids[..., None]).squeeze(-1).to(wide.dtype)
        # one collective for both
        sums = sum_over(torch.stack([wide.sum(dim=-1), chosen.where(inside, 0.0)]), tp)
        total, chosen = sums[0], sums[1]
        ctx.save_for_backward(wide.div_(total[..., None]), ids, inside)
        ctx.dtype = logits.dtype
        return total.log() + highest - chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, ids, inside = ctx.saved_tensors
        out = probabilities * grad[..., None]
        out.scatter_add_(-1, ids[..., None], -(grad * inside)[..., None])
        return out.to(ctx.dtype), None, None, None


def vocabulary_cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int, tp: Axis) -> Tensor:
    """-log softmax(logits)[label] of each token.

    logits: (..., V/tp), this rank's columns.   labels: (...) int64 below vocab_size.   Returns (...) wide, the same on
    all ranks of tp.   Columns from vocab_size on are padding and take no probability.
    """
    losses: Tensor = _VocabularyCrossEntropy.apply(logits, labels, vocab_size, tp)
    return losses
