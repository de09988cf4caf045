"""Relative positions as a learned number for each head and distance, added to the scores of attention.

Source: Raffel et al., T5, arXiv:1910.10683, section 2.1, and its public code: half of the buckets are for exact
distances, the other half grow with their logarithm up to `max_distance`, beyond which all share the last one. Without
causal order keys ahead and keys behind have half of the buckets each; with it, keys ahead share the bucket of
distance 0, for nobody looks at them. All layers of a stack add the same numbers.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_moe.layers.context import SequenceView
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import Axis


def distance_buckets(ahead: Tensor, *, num_buckets: int, max_distance: int, causal: bool) -> Tensor:
    """int64 bucket of each distance.   ahead: int64, place of the key less that of the query."""
    first = torch.zeros_like(ahead)
    if not causal:
        num_buckets //= 2
        first = (ahead > 0) * num_buckets
        distance = ahead.abs()
    else:
        distance = (-ahead).clamp(min=0)
    exact = num_buckets // 2
    # float64: with float32 a distance at a bucket's edge falls to either side
    share = (distance.clamp(min=1).double() / exact).log() / math.log(max_distance / exact)
    far = (exact + (share * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """A table (buckets, heads), heads split over tp; every stage of the pipeline has one of the same numbers."""

    def __init__(
        self,
        num_heads: int,
        tp: Axis,
        *,
        num_buckets: int,
        max_distance: int,
        causal: bool,
        std: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_buckets, self.max_distance, self.causal = num_buckets, max_distance, causal
        layout = ParamLayout((num_buckets, num_heads), splits={1: "tp"}, sum_over=("pp",), init=Init(std=std))
        self.weight = new_parameter(layout, tp, dtype=dtype)

    def forward(self, view: SequenceView) -> Tensor:
        """(1, heads/tp, S/cp, S'): this rank's rows, and all keys up to the end of the view."""
        keys = torch.arange(view.start + view.length, device=view.rows.device)
        ahead = keys - (view.rows + view.start)[:, None]
        buckets = distance_buckets(
            ahead, num_buckets=self.num_buckets, max_distance=self.max_distance, causal=self.causal
        )
        return F.embedding(buckets, self.weight).permute(2, 0, 1)[None]
