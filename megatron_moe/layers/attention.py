"""Grouped-query attention: projections split over tp by key-value group, the core an argument."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.context_parallel import gather_sequence
from megatron_moe.layers.linear import enter_parallel, leave_parallel, linear
from megatron_moe.layers.norm import Norm, ProjectionNorm
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


class AttentionCore(Protocol):
    """Scores, softmax and mixing, given heads of this rank's rows."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, ctx: ForwardContext) -> Tensor:
        """query (S/cp, B, G, q, D), key and value (S'/cp, B, G, D) -> (S/cp, B, G, q, D)."""


class GatheredAttention:
    """scaled_dot_product_attention over keys and values gathered from all context-parallel ranks."""

    def __init__(self, cp: Axis) -> None:
        self.cp = cp

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, ctx: ForwardContext) -> Tensor:
        rows, samples, groups, per_group, width = query.shape
        if ctx.cache is None:
            key, value = gather_sequence(torch.stack([key, value], dim=-2), self.cp, ctx.view.length).unbind(-2)
        mask = self._mask(key.shape[0], causal, ctx)
        context = F.scaled_dot_product_attention(
            query.reshape(rows, samples, groups * per_group, width).permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=causal and mask is None and rows > 1,
            enable_gqa=per_group > 1,
        )
        return context.permute(2, 0, 1, 3).reshape(rows, samples, groups, per_group, width)

    def _mask(self, keys: int, causal: bool, ctx: ForwardContext) -> Tensor | None:
        """(1 or B, 1, S/cp, S) bool, True = may look; None when the plain causal or full pattern will do."""
        view = ctx.view
        plain = self.cp.size == 1 and (view.start == 0 or view.num_rows == 1)
        if plain and not view.segmented:
            return None
        mine = view.rows + view.start
        allowed = torch.ones(1, 1, len(mine), keys, dtype=torch.bool, device=mine.device)
        if causal:
            allowed = allowed & (mine[:, None] >= torch.arange(keys, device=mine.device))
        if view.segmented:
            segments = view.segments.t()
            # padding rows look at padding, so that no row of the softmax is empty
            allowed = allowed & (segments[:, None, view.rows, None] == segments[:, None, None, :])
        return allowed


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
        if shape.qk_norm == "head":
            # every tensor-parallel rank normalises other heads
            self.q_norm: nn.Module = Norm(width, "RMSNorm", shape.norm_epsilon, partial=True, dtype=dtype)
            self.k_norm: nn.Module = Norm(width, "RMSNorm", shape.norm_epsilon, partial=True, dtype=dtype)
        elif shape.qk_norm == "projection":
            self.q_norm = ProjectionNorm((groups, q, width), shape.norm_epsilon, tp, dtype)
            self.k_norm = ProjectionNorm((groups, 1, width), shape.norm_epsilon, tp, dtype)

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """(S/(cp·tp), B, H) under sequence parallelism, else (S/cp, B, H); the same shape back."""
        view = ctx.view
        whole = enter_parallel(hidden, self.tp, view.num_rows, ctx.sequence_parallel)
        groups = self.qkv.shape[0]
        width = self.shape.head_dim
        out_features = groups * (self.per_group + 2) * width
        qkv = linear(whole, self.qkv, out_features, ctx.weight_gradients)
        qkv = qkv.view(*qkv.shape[:2], groups, self.per_group + 2, width)
        query, key, value = qkv.split([self.per_group, 1, 1], dim=3)
        query, key = self._place(query, key, ctx)
        key, value = key.squeeze(3), value.squeeze(3)
        if ctx.cache is not None:
            key, value = ctx.cache.append(self.index, key, value)
        context = self.core(query, key, value, self.shape.causal, ctx)
        partial = linear(context.flatten(2), self.output, self.shape.hidden_size, ctx.weight_gradients)
        return leave_parallel(partial, self.tp, view.num_rows, ctx.sequence_parallel)

    def _place(self, query: Tensor, key: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Normalise the heads, then turn them to their positions."""
        if self.shape.qk_norm != "none":
            query, key = self.q_norm(query), self.k_norm(key)
        if self.shape.rotary_width:
            positions = ctx.view.positions[ctx.view.rows]
            angles = rotary_angles(positions, self.shape.rotary_width, self.shape.rotary_base, query.dtype)
            query, key = rotate(query, angles), rotate(key, angles)
        return query, key
