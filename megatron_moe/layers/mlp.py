"""The dense feed-forward layer: two products, split over tp by the inner width."""

import torch
from torch import Tensor, nn

from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.parallel_linear import column_linear, row_linear
from megatron_moe.ops.activation import ACTIVATIONS
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import Axis


class MLP(nn.Module):
    """w1 (2, F, H): gate and up, or (1, F, H) without a gate; w2 (H, F)."""

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        activation: str,
        tp: Axis,
        *,
        init_std: float,
        output_std: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        branches, self.activation = ACTIVATIONS[activation]
        self.hidden_size = hidden_size
        self.tp = tp
        self.w1 = new_parameter(
            ParamLayout((branches, ffn_size, hidden_size), splits={1: "tp"}, init=Init(std=init_std)), tp, dtype=dtype
        )
        self.w2 = new_parameter(
            ParamLayout((hidden_size, ffn_size), splits={1: "tp"}, init=Init(std=output_std)), tp, dtype=dtype
        )

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """(S/(cp·tp), B, H) under sequence parallelism, else (S/cp, B, H); the same shape back."""
        split = ctx.split_over(self.tp)
        branches, local_ffn, _ = self.w1.shape
        inner = column_linear(hidden, self.w1, branches * local_ffn, split, ctx.weight_gradients)
        joined = self.activation(inner.view(*inner.shape[:-1], branches, local_ffn))
        return row_linear(joined, self.w2, self.hidden_size, split, ctx.weight_gradients)
