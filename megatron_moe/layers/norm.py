"""RMSNorm and LayerNorm over the hidden dimension."""

import torch
from torch import Tensor, nn

from megatron_moe.parallel.collectives import copy_to, reduce_from
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import Axis


class Norm(nn.Module):
    """Normalises the last dimension.

    kind: "RMSNorm" or "LayerNorm".  partial: each tensor-parallel rank sees other rows (or heads), so that its gradient
    is only a part of the whole.
    """

    def __init__(self, size: int, kind: str, epsilon: float, *, partial: bool, dtype: torch.dtype) -> None:
        super().__init__()
        sums = ("tp",) if partial else ()
        self.kind = kind
        self.epsilon = epsilon
        self.weight = new_parameter(
            ParamLayout((size,), sum_over=sums, decay=False, init=Init(constant=1.0)), dtype=dtype
        )
        if kind == "LayerNorm":
            self.bias = new_parameter(ParamLayout((size,), sum_over=sums, decay=False), dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        shape = (hidden.shape[-1],)
        if self.kind == "LayerNorm":
            return nn.functional.layer_norm(hidden, shape, self.weight, self.bias, self.epsilon)
        return nn.functional.rms_norm(hidden, shape, self.weight, self.epsilon)


class ProjectionNorm(nn.Module):
    """RMSNorm over all heads of a projection together (OLMoE), whose heads are split over tp."""

    def __init__(self, shape: tuple[int, int, int], epsilon: float, tp: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.tp = tp
        self.size = shape[0] * shape[1] * shape[2]
        layout = ParamLayout(shape, splits={0: "tp"}, decay=False, init=Init(constant=1.0))
        self.weight = new_parameter(layout, tp, dtype=dtype)

    def forward(self, heads: Tensor) -> Tensor:
        """heads: (S, B, G/tp, q, D), normalised over all G·q·D of the whole projection."""
        wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
        squares = wide.square().sum(dim=(-3, -2, -1), keepdim=True)
        # the sum is used by other heads on every rank: reduced forward, and its gradient too
        mean = copy_to(reduce_from(squares, self.tp), self.tp) / self.size
        return (wide * torch.rsqrt(mean + self.epsilon)).to(heads.dtype) * self.weight
