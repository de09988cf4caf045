"""Batch normalisation of queries that is the same on every layout: over the tokens of a routing group."""

import torch
from torch import Tensor, nn

from megatron_moe.moe.plan import TokenInfo
from megatron_moe.parallel.collectives import copy_to, reduce_from
from megatron_moe.parallel.state import Axis

EPSILON = 1e-5
MOMENTUM = 0.9  # share of the running statistics that a step keeps


class BatchNorm(nn.Module):
    """No learned scale. Training: mean and variance of the routing group; evaluation: those remembered."""

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, width: int, group_axis: Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self.group_axis = group_axis
        self.register_buffer("running_mean", torch.zeros(width, dtype=dtype))
        self.register_buffer("running_variance", torch.ones(width, dtype=dtype))

    def forward(self, rows: Tensor, info: TokenInfo) -> tuple[Tensor, dict[str, Tensor]]:
        """rows (T, width) wide -> the same, and the sums over groups that `remember` wants."""
        if not info.train:
            return (rows - self.running_mean) / (self.running_variance + EPSILON).sqrt(), {}
        real = rows.masked_fill(info.is_padding[:, None], 0.0)
        tokens = info.group_tokens.clamp(min=1)[:, None]
        mean = self._sums(real, info) / tokens
        centred = (rows - mean[info.groups]).masked_fill(info.is_padding[:, None], 0.0)
        variance = self._sums(centred.square(), info) / tokens
        speaks = (info.group_tokens > 0)[:, None] * float(self.group_axis.is_first)
        stats = {
            "query_mean_sum": (mean.detach() * speaks).sum(dim=0),
            "query_variance_sum": (variance.detach() * speaks).sum(dim=0),
            "query_groups": speaks.sum(),
        }
        return centred / (variance + EPSILON).sqrt()[info.groups], stats

    def _sums(self, rows: Tensor, info: TokenInfo) -> Tensor:
        """(G, width) over all ranks that share a group; each goes on with its own tokens."""
        local = rows.new_zeros(info.num_groups, rows.shape[1]).index_add(0, info.groups, rows)
        return copy_to(reduce_from(local, self.group_axis), self.group_axis)

    def remember(self, stats: dict[str, Tensor]) -> None:
        """After a step: statistics summed over the global batch's groups."""
        if float(stats["query_groups"]) == 0:
            return
        for running, name in ((self.running_mean, "query_mean_sum"), (self.running_variance, "query_variance_sum")):
            found = (stats[name] / stats["query_groups"]).to(running)
            running.mul_(MOMENTUM).add_(found * (1.0 - MOMENTUM))
