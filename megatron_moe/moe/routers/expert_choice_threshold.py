"""Expert choice by a threshold: each expert takes every token whose score reaches what usually makes its best c·T/E.

Source: Expert Threshold routing, arXiv:2603.11535 (abstract and figure): a moving average of the score at the quantile
1 - c/E of each expert; a token goes to every expert whose threshold it reaches, in training and evaluation alike. This
project's reading: the quantile is the k-th largest score of a routing group, k = T·c/E rounded down and at least 1,
and a step's value is its mean over the global batch's routing groups; the first step sets the average, which until
then is 1/E, so that routing is causal from the beginning and needs no warm-up with plain expert choice.

Guaranteed: a decision reads one token, and what earlier steps counted: causal, independent of the batch. The load
varies around c·T/E. State: `threshold` (E,) and whether it was set.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.capacity import exact, expert_places
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.expert_choice import average_choices, check_average
from megatron_moe.moe.routers.group_table import group_table
from megatron_moe.moe.routers.router import Router


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions:
    """What expert_choice_threshold alone can be told."""

    capacity: float = option(2.0, "c: experts per token on average", above=0)
    momentum: float = option(0.9, "share of the threshold that a step keeps", at_least=0, below=1)


class ExpertChoiceThresholdRouter(Router):
    """See the file's first lines."""

    Options = ThresholdOptions
    is_causal = True
    facts = Facts(
        paper="Expert Threshold, arXiv:2603.11535; Expert Choice, arXiv:2202.09368",
        chooses="token, by the experts' thresholds",
        batch_independent=True,
        scores="softmax before the choice",
        weights="raw score",
        capacity="about T·c/E, c = 2",
        good_for="expert choice in a decoder, token by token",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_topk", "router_pre_softmax", "aux_loss_coeff")
    options: ThresholdOptions
    threshold: Tensor
    is_set: Tensor

    def setup(self) -> None:
        super().setup()
        experts = self.config.num_experts
        check_average(self.options.capacity, self.config)
        self.new_state("threshold", torch.full((experts,), 1.0 / experts, dtype=self.dtype))
        self.new_state("is_set", torch.zeros((), dtype=torch.int64))

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token on average, rounded up."""
        return average_choices(cls.Options, config)

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H).  N = T · E, nobody for an expert whose threshold is not reached."""
        logits = self.logits(tokens)
        scores = logits.softmax(dim=1)
        experts = torch.arange(self.config.num_experts, device=scores.device).expand_as(scores)
        expert_ids = experts.masked_fill(scores < self.threshold, self.config.num_experts)
        stats = router_stats(scores, info)
        if info.train:
            stats |= self._quantiles(scores, info)
        losses = self.aux_losses(logits, scores, None, info)
        return self.plan(expert_ids, scores, info, scores=scores, aux_losses=losses, stats=stats)

    def _quantiles(self, scores: Tensor, info: TokenInfo) -> dict[str, Tensor]:
        """Sums over this microbatch's routing groups that have tokens; told once for all ranks that share them."""
        table = group_table(scores, info, self.group_axis)
        share = exact(self.options.capacity) / self.config.num_experts
        places = expert_places(info.group_tokens, share=share, rounding="floor", at_least=1)
        ranked = table.scores.sort(dim=1, descending=True).values  # (G, group_size, E)
        last = (places - 1).clamp(min=0)[:, None, None].expand(-1, 1, scores.shape[1])
        present = info.group_tokens > 0
        quantile = ranked.gather(1, last).squeeze(1).masked_fill(~present[:, None], 0.0)
        speaks = float(self.group_axis.is_first)
        return {"quantile_sum": quantile.sum(dim=0) * speaks, "groups": present.sum() * speaks}

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        """The average moves towards this step's mean quantile."""
        if float(own["groups"]) == 0:
            return
        found = (own["quantile_sum"] / own["groups"]).to(self.threshold)
        kept = self.options.momentum * float(self.is_set)
        self.threshold.mul_(kept).add_(found * (1.0 - kept))
        self.is_set.fill_(1)
