"""Top-k token choice: each token goes to its k best experts (Mixtral, OLMoE, Qwen-MoE, Megatron's default).

Sources. Softmax over the k chosen logits: Mixtral (arXiv:2401.04088, section 2.1); softmax over all experts before
the choice: Switch, OLMoE (arXiv:2409.02060). The two words `router_pre_softmax` and `topk_scaling_factor` are
Megatron-LM's (core/transformer/moe/moe_utils.py, topk_routing_with_score_function). This project's reading: ties go
to the lowest expert, and the choice is made on the logits, which rank experts as the scores do but without their
rounding.

Guaranteed: each non-padding token has exactly k different experts. Nothing is random. Causal: a decision reads one
token only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import BALANCE_CONVENTIONS, router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router


def best_experts(logits: Tensor, choices: int) -> Tensor:
    """(T, choices) int64: each row's largest entries, best first; equal ones by the lowest index. No gradient.

    logits: (T, E), finite or NaN.  torch.topk leaves the order of ties open, and a stable sort costs five times more.
    """
    left = logits.detach().clone()
    found = []
    for _ in range(choices):
        found.append(left.argmax(dim=1, keepdim=True))  # the first of equals
        left.scatter_(1, found[-1], float("-inf"))
    return torch.cat(found, dim=1)


@dataclass(frozen=True, kw_only=True)
class TopKOptions:
    """What top_k alone can be told."""

    renormalise: bool | None = option(
        None, "divide the k weights by their sum; none = only when the softmax follows the choice, as in Megatron"
    )
    balance: str = option("normalised", "what the balance loss counts", choices=BALANCE_CONVENTIONS)
    topk_scaling_factor: float = option(1.0, "factor on all weights", above=0)


class TopKRouter(Router):
    """See the file's first lines."""

    Options = TopKOptions
    is_causal = True
    facts = Facts(
        paper="Shazeer et al., arXiv:1701.06538; Mixtral, arXiv:2401.04088",
        chooses="token",
        batch_independent=True,
        scores="softmax after the choice; before it with --moe-router-pre-softmax",
        weights="sum to 1; raw with --moe-router-pre-softmax",
        capacity="dropless; Megatron's ceil(k·T/E·CF)",
        good_for="the default of today's open models: Mixtral, OLMoE, Qwen-MoE",
    )
    options: TopKOptions

    def setup(self) -> None:
        super().setup()
        if self.options.renormalise is False and not self.config.router_pre_softmax:
            raise ConfigError(
                "--moe-router-options renormalise=false: a softmax over the chosen experts always sums to 1; "
                "add --moe-router-pre-softmax, or leave the option out."
            )
        self.sums_to_one = self.options.renormalise or not self.config.router_pre_softmax
        if self.config.router_topk == 1 and self.sums_to_one:
            raise ConfigError(
                "--moe-router-topk 1 with weights that sum to 1 leaves every weight at 1, and the router without a "
                "gradient; add --moe-router-pre-softmax without renormalise=true, or use --moe-router-type switch."
            )

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        scores = logits.softmax(dim=1)
        expert_ids = best_experts(logits, self.config.router_topk)
        # p_i / Σ p_j over the chosen is the softmax of the chosen logits, without a division by a small sum
        weights = logits.gather(1, expert_ids).softmax(dim=1) if self.sums_to_one else scores.gather(1, expert_ids)
        return self.plan(
            expert_ids,
            weights * self.options.topk_scaling_factor,
            info,
            scores=scores,
            aux_losses=self.aux_losses(logits, scores, expert_ids, info, convention=self.options.balance),
            stats=router_stats(scores, info),
        )
