"""The attention core: scores, softmax and mixing, given heads; which keys a query sees is said once, here."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.layers.context import SequenceView
from megatron_moe.layers.context_parallel import gather_sequence
from megatron_moe.layers.recompute import run_again
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class Sight:
    """Which keys the queries see, and what is added to their scores.

    A query sees the keys of its own document (padding sees padding, so that no row of a softmax is empty): those up to
    its own place if `causal`, and those of the document's prefix; all of them if not.
    """

    queries: SequenceView
    keys: SequenceView  # the queries' own, or another stream (cross-attention)
    causal: bool
    bias: Tensor | None = None  # (1 or B, heads/tp, S/cp, S'), for the local queries and all keys
    cached: bool = False  # keys and values are those of all tokens so far, on every rank

    @property
    def segmented(self) -> bool:
        """Whether documents or padding have to be told apart."""
        return self.queries.segmented or self.keys.segmented

    @property
    def plain(self) -> bool:
        """Whether the causal or the full pattern over whole sequences is all there is."""
        return self.bias is None and not self.segmented and (self.queries.prefix is None or not self.causal)

    def allowed(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(1 or B, 1, R, C) bool, True = may look.

        rows: (R,) int64 sequence indices among the queries' tokens.   columns: (C,) among the keys'.
        """
        queries, keys = self.queries, self.keys
        found = torch.ones(1, 1, len(rows), len(columns), dtype=torch.bool, device=rows.device)
        if self.causal:
            found = found & (rows[:, None] + queries.start >= columns)
            if keys.prefix is not None:
                found = found | keys.prefix.t()[:, None, None, columns]
        if self.segmented:
            mine, theirs = queries.segments.t(), keys.segments.t()
            found = found & (mine[:, None, rows, None] == theirs[:, None, None, columns])
        return found


class AttentionCore(Protocol):
    """What mixes values for the heads of this rank's rows."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        """query (S/cp, B, G, q, D), key and value (S'/cp, B, G, D) -> (S/cp, B, G, q, D)."""


class GatheredAttention:
    """scaled_dot_product_attention over keys and values gathered from all context-parallel ranks."""

    def __init__(self, cp: Axis) -> None:
        self.cp = cp

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        if not sight.cached and self.cp.size > 1:
            key, value = gather_sequence(torch.stack([key, value], dim=-2), self.cp, sight.keys.length).unbind(-2)
        mask = self._mask(key.shape[0], sight)
        causal = sight.causal and mask is None and query.shape[0] > 1
        return mixed_by_torch(query, key, value, mask, causal)

    def _mask(self, keys: int, sight: Sight) -> Tensor | None:
        """(1 or B, 1 or heads, S/cp, S') bool or scores to add; None when the plain pattern will do."""
        view = sight.queries
        whole = self.cp.size == 1 and (view.start == 0 or view.num_rows == 1)
        if sight.plain and (whole or not sight.causal):
            return None
        allowed = sight.allowed(view.rows, torch.arange(keys, device=view.rows.device))
        return allowed if sight.bias is None else biased(sight.bias, allowed)


class RecomputedAttention:
    """A core of which only queries, keys and values are kept: it runs again in the backward pass."""

    def __init__(self, core: AttentionCore) -> None:
        self.core = core

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        if not torch.is_grad_enabled():
            return self.core(query, key, value, sight)
        found: Tensor = run_again(self.core, query, key, value, sight)
        return found


def biased(bias: Tensor, allowed: Tensor) -> Tensor:
    """(1 or B, heads, R, C): the bias where a query may look, -inf where not."""
    return bias.masked_fill(~allowed, float("-inf"))


def mixed_by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """torch's own attention.   query (R, B, G, q, D), key and value (C, B, G, D) -> (R, B, G, q, D)."""
    rows, samples, groups, per_group, width = query.shape
    context = F.scaled_dot_product_attention(
        query.reshape(rows, samples, groups * per_group, width).permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=per_group > 1,
    )
    return context.permute(2, 0, 1, 3).reshape(rows, samples, groups, per_group, width)
