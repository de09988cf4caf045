"""Expert prototyping: the experts fall into k prototypes, and a token goes to the best expert of each.

Source: M6-T, Yang et al., arXiv:2105.15082 (k top-1 routing). The softmax within each prototype, weights that are not
divided by their sum, and a balance loss for each prototype, added up, are those of public code (Hetu,
layers/KTop1Gate.py). This project's reading: prototype j holds experts j·E/k to (j+1)·E/k - 1; the z-loss, which the
paper does not have, reads the logits of all prototypes, each with a logarithm of its own: Σ_j (ln Σ_e exp z_e)^2, for
each has a softmax of its own; batch-prioritised routing asks how sure a token is of its surest choice. With as many
expert-parallel ranks as prototypes, each rank receives exactly one row of every token, however uneven the experts are.

Guaranteed: each non-padding token has k different experts, one of each prototype, found without a sequence of maxima.
With one prototype it is Switch without jitter. Weights sum to at most k. Prototypes do not compete for places: an
expert is asked for by one choice only, and has CF·T/(E/k) places, which is --moe-expert-capacity-factor CF (Hetu
rounds T/E·CF up before it multiplies by k). The balance loss, --moe-aux-loss-coeff, is k when balanced; 0.01 is
Switch's coefficient, the paper's was not checked. Causal: a decision reads one token only.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import load_balance_loss, router_stats, z_loss
from megatron_moe.moe.plan import AuxLoss, RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.top_k import best_experts


class M6TRouter(Router):
    """See the file's first lines. A letter beyond the house's: W experts in each prototype."""

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
    unused_fields: ClassVar[tuple[str, ...]] = (
        "router_pre_softmax",
        "slot_priority",  # an expert is asked for by one choice only
    )

    def setup(self) -> None:
        super().setup()
        experts, prototypes = self.config.num_experts, self.config.router_topk
        if experts % prototypes:
            fitting = ", ".join(str(number) for number in range(1, experts) if experts % number == 0)
            raise ConfigError(
                f"--num-experts {experts} does not fall into --moe-router-topk {prototypes} prototypes of one size; "
                f"use a multiple of {prototypes}, or {fitting} prototypes."
            )
        if experts == prototypes:
            raise ConfigError(
                f"--moe-router-topk {prototypes} makes each of --num-experts {experts} a prototype of its own: every "
                f"weight stays at 1, and the router without a gradient; use fewer prototypes, or more experts."
            )
        self.width = experts // prototypes

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token: one of each prototype."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        by_prototype = logits.view(-1, self.width)  # (T·k, W)
        scores = by_prototype.softmax(dim=1).view_as(logits)
        best = best_experts(by_prototype, 1).view(-1, self.config.router_topk)
        expert_ids = best + torch.arange(0, self.config.num_experts, self.width, device=best.device)
        return self.plan(
            expert_ids,
            scores.gather(1, expert_ids),
            info,
            scores=scores,
            aux_losses=self._losses(by_prototype, scores, expert_ids, info) if info.train else {},
            stats=router_stats(scores, info),
        )

    def _losses(self, by_prototype: Tensor, scores: Tensor, expert_ids: Tensor, info: TokenInfo) -> dict[str, AuxLoss]:
        losses = {}
        if self.config.aux_loss_coeff:
            # Σ_j E/k Σ_e f_e P_e = E Σ_e f_e / k · P_e, over all experts
            share = load_balance_loss(scores, expert_ids, info, group_axis=self.group_axis, convention="normalised")
            losses["load_balance_loss"] = AuxLoss(share, self.config.aux_loss_coeff)
        if self.config.z_loss_coeff:
            rows = replace(info, is_padding=info.is_padding.repeat_interleave(self.config.router_topk))
            losses["z_loss"] = AuxLoss(z_loss(by_prototype, rows), self.config.z_loss_coeff, per="token")
        return losses
