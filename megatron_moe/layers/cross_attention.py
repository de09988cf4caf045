"""Attention from one stream to another: queries of the decoder, keys and values of the encoder's output."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_moe.layers.attention import AttentionShape, query_norms
from megatron_moe.layers.attention_core import AttentionCore, Sight
from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.parallel_linear import column_linear, row_linear
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import Axis


class CrossAttention(nn.Module):
    """q (G, q, D, H), kv (G, 2, D, H) and output (H, G, q, D), each split by group over tp. No positions, no bias.

    [arXiv:1706.03762, section 3.2.3; T5, arXiv:1910.10683]
    """

    def __init__(self, index: int, shape: AttentionShape, tp: Axis, core: AttentionCore, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.index = index
        self.shape = shape
        self.tp = tp
        self.core = core
        self.per_group = shape.num_heads // shape.num_groups
        groups, width, hidden = shape.num_groups, shape.head_dim, shape.hidden_size
        self.q = self._split((groups, self.per_group, width, hidden), 0, shape.init_std, dtype)
        self.kv = self._split((groups, 2, width, hidden), 0, shape.init_std, dtype)
        self.output = self._split((hidden, groups, self.per_group, width), 1, shape.output_std, dtype)
        self.q_norm, self.k_norm = query_norms(shape, tp, dtype)

    def _split(self, size: tuple[int, ...], dim: int, std: float, dtype: torch.dtype) -> nn.Parameter:
        return new_parameter(ParamLayout(size, splits={dim: "tp"}, init=Init(std=std)), self.tp, dtype=dtype)

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """(S/(cp·tp), B, H) under sequence parallelism, else (S/cp, B, H); the same shape back."""
        assert ctx.source is not None
        view, split = ctx.view, ctx.split_over(self.tp)
        groups, width = self.q.shape[0], self.shape.head_dim
        query = column_linear(hidden, self.q, groups * self.per_group * width, split, ctx.weight_gradients)
        query = self.q_norm(query.view(*query.shape[:2], groups, self.per_group, width))
        if ctx.cache is None:
            key, value = self._keys_and_values(ctx)
        else:
            key, value = ctx.cache.keep(self.index, lambda: self._keys_and_values(ctx))
        context = self.core(query, key, value, Sight(view, ctx.source, causal=False, cached=ctx.cache is not None))
        return row_linear(context.flatten(2), self.output, self.shape.hidden_size, split, ctx.weight_gradients)

    def _keys_and_values(self, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Both (S'/cp, B, G/tp, D)."""
        assert ctx.source is not None and ctx.memory is not None
        split = replace(ctx, view=ctx.source).split_over(self.tp)
        groups, width = self.kv.shape[0], self.shape.head_dim
        both = column_linear(ctx.memory, self.kv, groups * 2 * width, split, ctx.weight_gradients)
        key, value = both.view(*both.shape[:2], groups, 2, width).split(1, dim=3)
        return self.k_norm(key).squeeze(3), value.squeeze(3)
