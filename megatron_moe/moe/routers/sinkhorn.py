"""Sinkhorn (S-BASE): each token's best experts under a transport plan in which all experts weigh the same.

Source: Clark et al., arXiv:2202.01169 (S-BASE); the iteration, its start and its stop, and the weights follow
Megatron-LM (core/transformer/moe/moe_utils.py `sinkhorn`, core/transformer/moe/router.py `sinkhorn_load_balancing`):
the plan Pi = diag(a) · exp(z / temperature) · diag(b) has rows that sum to 1/T and columns that sum to 1/E;
a <- (1/T) / (K b + eps), b <- (1/E) / (K' a + eps), until b moves by less than `tolerance` on average. Training takes
the k largest of a token's row, evaluation the k largest logits. A weight is the sigmoid of the expert's logit for
k = 1, else the softmax over all experts at the chosen ones; the plan is no part of it and has no gradient.

This project's reading: the iterations are bounded, for with eps a tight tolerance is never reached; the plan is that of
the routing group, computed by every rank from all its tokens' logits, so that no order of summation decides; a token
whose logits are not finite has no part in it; experts are ranked by ln(K b), which orders a row as Pi does.

Guaranteed: k different experts for each token; in training loads that are about, not exactly, equal. The paper keeps a
capacity so that shapes are static: --moe-expert-capacity-factor. There is no balance loss, which the plan replaces; the
z-loss is allowed. Not causal in training: the plan depends on later tokens, and on other sequences of its group. In
evaluation a token's experts depend on that token alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.group_table import group_table
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.top_k import best_experts

_EPS = 1e-8


def column_scales(logits: Tensor, is_token: Tensor, *, temperature: float, tolerance: float, iterations: int) -> Tensor:
    """(G, E): ln b of each group's balanced plan, so that ln Pi is logits / temperature + ln b, up to a row's constant.

    logits: (G, T, E) wide.   is_token: (G, T) bool.   tolerance: mean change of b at which a group stands still.
    """
    # a row's largest is taken out, for a makes up for any factor of a row, and exp must not overflow
    kernel = (logits / temperature - logits.amax(dim=2, keepdim=True) / temperature).exp()
    present = is_token & logits.isfinite().all(dim=2)
    kernel = kernel.where(present[..., None], 0.0)
    row_sum = 1.0 / present.sum(dim=1, keepdim=True).clamp(min=1)
    scale = torch.ones_like(kernel[:, 0])
    moves = torch.ones_like(scale[:, :1], dtype=torch.bool)
    for _ in range(iterations):
        rows = row_sum / ((kernel @ scale[..., None])[..., 0] + _EPS)
        found = 1.0 / (scale.shape[1] * ((rows[:, None] @ kernel)[:, 0] + _EPS))
        change = (found - scale).abs().mean(dim=1, keepdim=True)
        # a group that is done stays as it is, whatever the others of its microbatch need
        scale = found.where(moves, scale)
        moves = moves & (change > tolerance)
        if not bool(moves.any()):
            break
    return scale.log()


@dataclass(frozen=True, kw_only=True)
class SinkhornOptions:
    """What sinkhorn alone can be told."""

    iterations: int = option(100, "most iterations towards the balanced plan", at_least=1)
    tolerance: float = option(1e-4, "mean change of the experts' factors at which to stop; Megatron's", at_least=0)
    temperature: float = option(1.0, "of the plan: small is greedy for scores, large only for balance", above=0)


class SinkhornRouter(Router):
    """See the file's first lines."""

    Options = SinkhornOptions
    is_causal = False
    facts = Facts(
        paper="S-BASE, arXiv:2202.01169",
        chooses="joint",
        batch_independent=True,
        scores="sigmoid for k = 1, else softmax before the choice",
        weights="raw score",
        capacity="dropless; T/E·CF as in the paper",
        good_for="near balance in training without a loss; cheaper than BASE, and for any k",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_pre_softmax", "aux_loss_coeff")
    options: SinkhornOptions

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        wishes = self._planned(logits.detach(), info) if info.train else logits
        expert_ids = best_experts(wishes, self.config.router_topk)
        scores = logits.softmax(dim=1)
        weights = (logits.sigmoid() if self.config.router_topk == 1 else scores).gather(1, expert_ids)
        return self.plan(
            expert_ids,
            weights,
            info,
            scores=scores,
            aux_losses=self.aux_losses(logits, scores, None, info),
            stats=router_stats(scores, info),
        )

    def _planned(self, logits: Tensor, info: TokenInfo) -> Tensor:
        """(T, E): ln Pi of this rank's tokens, up to a constant of each row."""
        table = group_table(logits, info, self.group_axis, absent=0.0)
        scales = column_scales(
            table.scores,
            table.is_token,
            temperature=self.options.temperature,
            tolerance=self.options.tolerance,
            iterations=self.options.iterations,
        )
        return logits / self.options.temperature + scales[info.groups]
