"""The norm of the whole model's gradient, each number counted once on every layout, and clipping by it."""

import math

import torch
from torch import Tensor

from megatron_moe.optim.owned import Gradients

# elements summed in the gradient's own precision before float64 takes over: one float32 sum over 40 M is 0.6 % off
_ROW = 1024


def global_norm(buckets: Gradients, health: Tensor | None = None) -> float:
    """The 2-norm of the reduced gradients of all ranks, the same number on each. Collective over the world.

    Infinite or NaN if any gradient is. Waits for the device.   health: () added on its way; 0 if all is well here.
    """
    own = [
        _squared_sum(segment.of(bucket.own_gradients))
        for bucket in buckets.buckets
        for segment in bucket.segments
        if bucket.speaks_for(segment.layout)
    ]
    total = torch.zeros((), dtype=torch.float64, device=buckets.device)
    if own:
        total = torch.stack(own).sum()
    if health is not None:
        total = total + health
    return math.sqrt(buckets.state.world.comm.all_reduce_(total).item())


def _squared_sum(values: Tensor) -> Tensor:
    """Σ v² of a flat tensor, () float64."""
    whole = values.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1).double()
    rest = torch.linalg.vector_norm(values[whole:]).double()
    squared: Tensor = rows.square().sum() + rest.square()
    return squared


def clip_(buckets: Gradients, max_norm: float, health: Tensor | None = None) -> float:
    """Scale the reduced gradients in place by min(1, max_norm / (norm + 1e-6)); returns the norm before.

    max_norm 0 clips nothing. A norm that is not finite scales nothing: the caller must not make the update.
    health: as in global_norm.
    """
    norm = global_norm(buckets, health)
    scale = clip_scale(norm, max_norm)
    if scale < 1.0:
        for bucket in buckets.buckets:
            bucket.own_gradients.mul_(scale)
    return norm


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by; 1 when nothing is clipped."""
    if max_norm == 0.0 or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
