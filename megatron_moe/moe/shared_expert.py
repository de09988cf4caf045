"""An expert that every token visits, beside the routed ones.  [DeepSeekMoE, arXiv:2401.06066; Qwen2-MoE's gate]"""

import torch
from torch import Tensor, nn

from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.mlp import MLP
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import Axis


class SharedExpert(MLP):
    """A dense MLP; gated: its answer is weighted by sigmoid(gate · token)."""

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        activation: str,
        tp: Axis,
        *,
        gated: bool,
        partial: bool,
        init_std: float,
        output_std: float,
        dtype: torch.dtype,
    ) -> None:
        """partial: each tensor-parallel rank weighs other tokens (sequence parallelism)."""
        super().__init__(hidden_size, ffn_size, activation, tp, init_std=init_std, output_std=output_std, dtype=dtype)
        sums = ("tp",) if partial else ()
        layout = ParamLayout((1, hidden_size), sum_over=sums, init=Init(std=init_std))
        self.gate = new_parameter(layout, dtype=dtype) if gated else None

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        answer = super().forward(hidden, ctx)
        if self.gate is None:
            return answer
        return torch.sigmoid(nn.functional.linear(hidden, self.gate)) * answer
