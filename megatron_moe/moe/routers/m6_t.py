"""Expert prototyping: the experts fall into k prototypes, and a token goes to the best expert of each.

Source: M6-T, Yang et al., arXiv:2105.15082, section 3 (k top-1 routing); the softmax within each prototype, weights
that are not divided by their sum, and a balance loss for each prototype are those of public code (Hetu,
layers/KTop1Gate.py). This project's reading: prototype j holds experts j·E/k to (j+1)·E/k - 1; the z-loss reads all E
logits of a token.

Guaranteed: each non-padding token has k different experts, one of each prototype, found without a sequence of maxima.
With one prototype it is Switch without jitter. The paper's capacity is CF·T/(E/k) places for each expert, which is
--moe-expert-capacity-factor CF; prototypes do not compete for places. Causal: a decision reads one token only.
"""

from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.top_k import best_experts


class M6TRouter(Router):
    """See the file's first lines."""

    is_causal = True
    facts = Facts(
        paper="M6-T, arXiv:2105.15082",
        chooses="token",
        batch_independent=True,
        scores="softmax within each prototype",
        weights="raw score",
        capacity="k·ceil(T/E·CF)",
        losses=("balance 0.01 of each prototype",),
        good_for="k experts for the price of one maximum; experts of different kinds",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_pre_softmax",)

    def setup(self) -> None:
        super().setup()
        experts, prototypes = self.config.num_experts, self.config.router_topk
        if experts % prototypes:
            raise ConfigError(
                f"--num-experts {experts} does not fall into --moe-router-topk {prototypes} prototypes of one size; "
                f"use a multiple of {prototypes}."
            )

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token: one of each prototype."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        prototypes = self.config.router_topk
        size = self.config.num_experts // prototypes
        by_prototype = logits.view(-1, size)
        scores = by_prototype.softmax(dim=1).view_as(logits)
        best = best_experts(by_prototype, 1).view(-1, prototypes)
        expert_ids = best + torch.arange(prototypes, device=best.device) * size
        # Σ_j (E/k) Σ f P: E Σ (f/k) P over all experts
        losses = self.aux_losses(logits, scores, expert_ids, info, convention="normalised")
        stats = router_stats(scores, info)
        return self.plan(expert_ids, scores.gather(1, expert_ids), info, scores=scores, aux_losses=losses, stats=stats)
