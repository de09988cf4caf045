"""Grouped-query attention: projections split over tp by key-value group, the core an argument."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_moe.layers.attention_core import AttentionCore, Sight
from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.norm import Norm, ProjectionNorm
from megatron_moe.layers.parallel_linear import column_linear, row_linear
from megatron_moe.ops.rotary import rotary_angles, rotate
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and choices of one attention layer."""

    hidden_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    causal: bool
    rotary_width: int  # dimensions of a head that turn; 0 = no rotary embedding
    rotary_base: float
    qk_norm: str  # "none", "head" or "projection"
    norm_epsilon: float
    init_std: float
    output_std: float


def query_norms(shape: AttentionShape, tp: Axis, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """What queries (…, G/tp, q, D) and keys (…, G/tp, 1, D) are normalised by."""
    width = shape.head_dim
    if shape.qk_norm == "head":
        # every tensor-parallel rank normalises other heads
        norms = [Norm(width, "RMSNorm", shape.norm_epsilon, partial=True, dtype=dtype) for _ in range(2)]
        return norms[0], norms[1]
    if shape.qk_norm == "projection":
        queries = (shape.num_groups, shape.num_heads // shape.num_groups, width)
        keys = (shape.num_groups, 1, width)
        return (
            ProjectionNorm(queries, shape.norm_epsilon, tp, dtype),
            ProjectionNorm(keys, shape.norm_epsilon, tp, dtype),
        )
    return nn.Identity(), nn.Identity()


class Attention(nn.Module):
    """qkv (G, q+2, D, H) split by group over tp; output (H, G, q, D) likewise.

    Raises ValueError when the groups do not split over tp.
    """

    def __init__(self, index: int, shape: AttentionShape, tp: Axis, core: AttentionCore, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.index = index
        self.shape = shape
        self.tp = tp
        self.core = core
        self.per_group = shape.num_heads // shape.num_groups
        groups, q, width, hidden = shape.num_groups, self.per_group, shape.head_dim, shape.hidden_size
        self.qkv = new_parameter(
            ParamLayout((groups, q + 2, width, hidden), splits={0: "tp"}, init=Init(std=shape.init_std)),
            tp,
            dtype=dtype,
        )
        self.output = new_parameter(
            ParamLayout((hidden, groups, q, width), splits={1: "tp"}, init=Init(std=shape.output_std)), tp, dtype=dtype
        )
        self.q_norm, self.k_norm = query_norms(shape, tp, dtype)

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """(S/(cp·tp), B, H) under sequence parallelism, else (S/cp, B, H); the same shape back."""
        view, split = ctx.view, ctx.split_over(self.tp)
        groups = self.qkv.shape[0]
        width = self.shape.head_dim
        out_features = groups * (self.per_group + 2) * width
        qkv = column_linear(hidden, self.qkv, out_features, split, ctx.weight_gradients)
        qkv = qkv.view(*qkv.shape[:2], groups, self.per_group + 2, width)
        query, key, value = qkv.split([self.per_group, 1, 1], dim=3)
        query, key = self._place(query, key, ctx)
        # a copy: as a view it would keep all of qkv for the backward pass
        key, value = key.squeeze(3), value.squeeze(3).contiguous()
        if ctx.cache is not None:
            key, value = ctx.cache.append(self.index, key, value)
        sight = Sight(view, view, self.shape.causal, ctx.bias, cached=ctx.cache is not None)
        context = self.core(query, key, value, sight)
        return row_linear(context.flatten(2), self.output, self.shape.hidden_size, split, ctx.weight_gradients)

    def _place(self, query: Tensor, key: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Normalise the heads, then turn them to their positions."""
        query, key = self.q_norm(query), self.k_norm(key)
        if self.shape.rotary_width:
            positions = ctx.view.positions[ctx.view.rows]
            angles = rotary_angles(positions, self.shape.rotary_width, self.shape.rotary_base, query.dtype)
            query, key = rotate(query, angles), rotate(key, angles)
        return query, key
