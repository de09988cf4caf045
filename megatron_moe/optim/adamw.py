"""AdamW on lists of flat tensors: Adam with the weight decay outside of the moments.  [Loshchilov, arXiv:1711.05101]"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# where one kernel updates a tensor; elsewhere torch falls back on several
_FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class AdamWSegment:
    """Flat wide tensors of one length: the weights, their gradient and its two running means."""

    weights: Tensor
    gradients: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def adamw_(
    segments: Sequence[AdamWSegment],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update number `step` (1 is the first), in place; gradients are kept.

    w ← w - lr · decay · w - lr · m̂ / (√v̂ + eps), with m̂ = m / (1 - beta1^step), v̂ = v / (1 - beta2^step)
    """
    if not segments:
        return
    device = segments[0].weights.device
    # torch counts for itself, one tensor for each weight: all are views of one
    counts = torch.full((len(segments),), float(step - 1), dtype=torch.float32, device=device)
    adamw(
        [segment.weights for segment in segments],
        [segment.gradients for segment in segments],
        [segment.exp_avg for segment in segments],
        [segment.exp_avg_sq for segment in segments],
        [],
        list(counts.unbind()),
        fused=device.type in _FUSED_DEVICES,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
    )
