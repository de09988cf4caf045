"""ST-MoE top-n: the best expert always, experts 2 to n if they weigh enough.

Source: Zoph et al., arXiv:2202.08906, appendix G (top-n routing and its threshold of 0.2, table 21), section 3.3
(router z-loss, weight 0.001), appendix A (balance loss over first choices, weight 0.01). With g the n largest scores
divided by their sum, expert i is used with probability min(1, g_i / threshold). The other policies are from the
paper's own code base (Mesh-TensorFlow, transformer/moe.py): all, none, and threshold (used if g_i > threshold), set
separately for training and evaluation. This project's reading: evaluation defaults to `threshold`, which is
deterministic, where that code defaults to `random`; a weight keeps its value when another expert is passed over.

Guaranteed: each non-padding token has one to n different experts. The paper's capacity, 1.25 in training and 2.0 in
evaluation without n in the formula, is --moe-expert-capacity-factor 1.25 --moe-eval-capacity-factor 2
--no-moe-capacity-includes-k. No jitter: it hurt at scale (section 3.2). Causal, as for gshard, unless first choices
are served first (k_major) from a limited number of places.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.top_k import best_experts

POLICIES = ("random", "threshold", "all", "none")


@dataclass(frozen=True, kw_only=True)
class STMoEOptions:
    """What st_moe alone can be told."""

    train_policy: str = option("random", "when experts 2 to n are used in training", choices=POLICIES)
    eval_policy: str = option("threshold", "the same in evaluation", choices=POLICIES)
    train_threshold: float = option(0.2, "weight from which an expert is surely used", at_least=0, at_most=1)
    eval_threshold: float = option(0.2, "the same in evaluation", at_least=0, at_most=1)


class STMoERouter(Router):
    """See the file's first lines."""

    Options = STMoEOptions
    is_causal = True
    facts = Facts(
        paper="ST-MoE, arXiv:2202.08906",
        chooses="token",
        batch_independent=True,
        scores="softmax before the choice",
        weights="sum to 1 before experts are passed over",
        capacity="T/E·CF without k, CF 1.25 in training, 2 in evaluation, at least 4",
        losses=("balance 0.01", "z 0.001"),
        good_for="stable training at scale, and transfer",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_pre_softmax",)
    options: STMoEOptions

    def setup(self) -> None:
        super().setup()
        if self.config.router_topk == 1:
            raise ConfigError(
                "--moe-router-topk 1 with st_moe leaves every weight at 1, and the router without a gradient; "
                "use 2 or more, or --moe-router-type switch."
            )
        self.is_random = self.options.train_policy == "random"

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token, at most."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        scores = logits.softmax(dim=1)
        expert_ids = best_experts(logits, self.config.router_topk)
        shares = logits.gather(1, expert_ids).softmax(dim=1)
        passed_over = self._passed_over(shares.detach()[:, 1:], info)
        others = expert_ids[:, 1:].masked_fill(passed_over, self.config.num_experts)
        return self.plan(
            torch.cat([expert_ids[:, :1], others], dim=1),
            shares,
            info,
            scores=scores,
            aux_losses=self.aux_losses(logits, scores, expert_ids, info),
            stats=router_stats(scores, info),
        )

    def _passed_over(self, shares: Tensor, info: TokenInfo) -> Tensor:
        """(T, n-1) bool: the policy's no to experts 2 to n, whose weights are `shares`."""
        options = self.options
        policy = options.train_policy if info.train else options.eval_policy
        threshold = options.train_threshold if info.train else options.eval_threshold
        if policy == "threshold":
            return shares <= threshold
        if policy == "random":
            draws = info.random.at(stream="further_experts").uniform_rows(info.global_keys, shares.shape[1])
            # used with probability min(1, share / threshold), without the division
            return shares <= draws * threshold
        return torch.full_like(shares, policy == "none", dtype=torch.bool)
