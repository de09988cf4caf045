"""Avg-K: a wide feed-forward layer cut into blocks, of which each token uses those whose mean key it likes best.

Source: Liu et al., arXiv:2305.13999: FFN(x) = act(x Kᵀ) V is a memory of B blocks with g cells each; the mean e_i of a
block's keys stands for it, s_i = x · e_i is the mean of the block's pre-activations, and the b best blocks are used. No
parameters and no balance loss. --num-experts is B, --moe-ffn-hidden-size g, --moe-router-topk b; keep g · b when the
block size is changed. Gated layers: the mean row of the gate projection (EMoE's code, which averages its outputs). A
bias or multiplier after the activation (--moe-expert-bias) is no part of the score.
What rests on public code (qiuzh20/EMoE) and on this project's reading: selected blocks have weight 1 and keys take no
gradient (gate_weight = one, key_source = detached). With softmax (over all B, not renormalised) or sigmoid the weight
gives the tokens a gradient, and with live keys also the blocks' keys. --moe-aux-loss-coeff is the Switch loss on
softmax(s), counting each of the b choices and divided by b, and --moe-z-loss-coeff the z-loss of s; both are 0 in the
paper and act on tokens only, unless keys are live.

The paper's learned gate (top-b, "indirect") needs no router of its own: --moe-router-type top_k
--moe-router-pre-softmax --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type one_per_rank learns e_i in place of the
means, with softmax weights and the same loss. Given the means as its weights it is this router with gate_weight =
softmax and detached keys.

Guaranteed: each non-padding token has b different blocks, equal scores by the lowest index; nothing is random. With
b = B and weight one the layer is the dense one of width B · g. Causal: a decision reads one token only. Dropless in
the paper. The means are taken and gathered over expert ranks in each forward pass: B · H numbers.
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


@dataclass(frozen=True, kw_only=True)
class AvgKOptions:
    """What avg_k alone can be told."""

    gate_weight: str = option(
        "one",
        "weight of a chosen block: 1, its share of the softmax over all blocks, or the sigmoid of its score",
        choices=("one", "softmax", "sigmoid"),
    )
    key_source: str = option(
        "detached",
        "whether a weight's or loss's gradient reaches the keys through their mean",
        choices=("detached", "live"),
    )


class AvgKRouter(Router):
    """See the file's first lines."""

    Options = AvgKOptions
    is_causal = True
    dispatcher = "one_per_rank"  # small blocks: a rank holds several of a token's
    reads_expert_keys = True
    facts = Facts(
        paper="Avg-K, arXiv:2305.13999",
        chooses="token",
        batch_independent=True,
        scores="mean pre-activation of the block",
        weights="1; softmax or sigmoid on demand",
        capacity="dropless",
        good_for="many small blocks without router weights or a balance loss",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_pre_softmax",)
    options: AvgKOptions

    def setup(self) -> None:
        """No parameters: the keys are the experts'."""
        config, options = self.config, self.options
        has_losses = config.aux_loss_coeff or config.z_loss_coeff
        if options.key_source == "live" and options.gate_weight == "one" and not has_losses:
            raise ConfigError(
                "--moe-router-options key_source=live has no effect with gate_weight=one, through which no gradient "
                "passes; leave it out, or use gate_weight=softmax or sigmoid."
            )
        if config.token_drop_policy == "probs" and options.gate_weight == "one":
            raise ConfigError(
                "--moe-token-drop-policy probs has no effect with gate_weight=one, for all weights are equal; use bpr "
                "or position, or gate_weight=softmax or sigmoid."
            )

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Blocks of one token."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H).   info.expert_keys: (B, H)."""
        assert info.expert_keys is not None
        keys = info.expert_keys if self.options.key_source == "live" else info.expert_keys.detach()
        logits = tokens.to(self.dtype) @ keys.t()
        scores = logits.softmax(dim=1)
        expert_ids = best_experts(logits, self.config.router_topk)
        return self.plan(
            expert_ids,
            self._weights(logits, scores, expert_ids),
            info,
            scores=scores,
            aux_losses=self.aux_losses(logits, scores, expert_ids, info, convention="normalised"),
            stats=router_stats(scores, info),
        )

    def _weights(self, logits: Tensor, scores: Tensor, expert_ids: Tensor) -> Tensor:
        """(T, b)."""
        match self.options.gate_weight:
            case "softmax":
                return scores.gather(1, expert_ids)
            case "sigmoid":
                return logits.gather(1, expert_ids).sigmoid()
        return torch.ones_like(expert_ids, dtype=self.dtype)
