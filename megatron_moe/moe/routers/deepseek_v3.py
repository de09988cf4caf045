"""DeepSeek-V3: sigmoid scores, balanced by a bias on the choice instead of a loss.

Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2, read in the paper's text (eq. 17-20, limits and drops) or checked
against transformers' DeepseekV3TopkRouter (scores, choice, weights); the balancing rule is that of arXiv:2408.15664.
- s = sigmoid of the logits; the k experts with the largest s + b; weights g = s / Σ s of the chosen, times route_scale.
  The bias decides who is chosen and is in no weight; it has no gradient.
- after each step, over all its tokens: b_e += u · sign(mean load - load_e), loads before any capacity. u is 0.001 for
  the first 14.3 of 14.8 trillion tokens and then 0 (4.2): bias_update_rate and bias_update_until.
- node-limited routing: a token uses M groups, those with the largest sum of their best s + b. The paper sums the k / M
  best, as does Megatron-LM (group_limited_topk); DeepSeek's own inference code and transformers the 2 best, which is
  the same for V3 (k = 8, M = 4) and the default here; group_score_experts=none follows the paper.
- the sequence-wise balance loss (eq. 17-20, weight 0.0001): E / (k·T) · Σ_e count_e P_e for each sample, P the mean of
  s / Σ s over all experts, counts of the k largest s without bias and groups (eq. 18; Megatron-LM counts so too).
- balance=quantile sets the biases in one go instead of step by step: see quantile_balance.py.
From public code only: route_scale 2.5 (deepseek-ai/DeepSeek-V3, config_671B.json). This project's reading: a load equal
to the mean leaves its bias; `softmax` scores are there for comparison, arXiv:2408.15664 recommends the sigmoid.

Guaranteed: each non-padding token has exactly k different experts from at most M groups, and weights that sum to
route_scale. Nothing is random. Causal: a decision reads one token and biases of earlier steps. In evaluation the biases
stand still. The paper drops no token; a capacity, where one is set, is each expert's own.

Which flags make DeepSeek-V3 (671B): --num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048
--moe-shared-expert-intermediate-size 2048 --moe-layer-freq 0,0,0,1,1,... (three dense layers first)
--moe-router-options num_groups=8 topk_groups=4 sequence_loss_coeff=0.0001 bias_update_until=0.966
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import load_balance_loss, router_stats
from megatron_moe.moe.plan import AuxLoss, RoutingPlan, TokenInfo
from megatron_moe.moe.routers.group_limited import ExpertGroups, GroupOptions, expert_groups, limited_experts
from megatron_moe.moe.routers.quantile_balance import next_bias, quantile_stats
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.top_k import best_experts


@dataclass(frozen=True, kw_only=True)
class DeepSeekV3Options(GroupOptions):
    """What deepseek_v3 alone can be told."""

    group_score_experts: int | None = option(
        2, "best experts whose scores add up to their group's; none = k / topk_groups, as in the paper", at_least=1
    )
    score: str = option("sigmoid", "what makes a score of a logit", choices=("sigmoid", "softmax"))
    route_scale: float = option(2.5, "what the weights of a token sum to", above=0)
    balance: str = option(
        "sign",
        "how biases follow the loads: by bias_update_rate after each step, or at once, to the quantiles of the scores "
        "that would have balanced them (Megatron's quantile balancing)",
        choices=("sign", "quantile"),
    )
    bias_update_rate: float = option(1e-3, "how far a bias moves after each step; 0 = never", at_least=0)
    bias_update_until: float = option(
        1.0, "part of the training after which biases stand still; 0.966 in DeepSeek-V3", above=0, at_most=1
    )
    sequence_loss_coeff: float = option(
        0.0, "weight of the balance loss of each sample; 0.0001 in DeepSeek-V3", at_least=0
    )


class DeepSeekV3Router(Router):
    """See the file's first lines. State: expert_bias (E,) wide, added to the scores for the choice only."""

    Options = DeepSeekV3Options
    is_causal = True
    dispatcher = "one_per_rank"  # k is large: a token travels once to each of its ranks, whatever it asks of them
    facts = Facts(
        paper="DeepSeek-V3, arXiv:2412.19437; arXiv:2408.15664",
        chooses="token",
        batch_independent=True,
        scores="sigmoid",
        weights="sum to route_scale",
        capacity="dropless",
        losses=("sequence 0.0001",),
        good_for="balance without a loss that disturbs the model",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_pre_softmax", "aux_loss_coeff")
    options: DeepSeekV3Options
    groups: ExpertGroups | None
    expert_bias: Tensor

    def setup(self) -> None:
        super().setup()
        self._check_effects()
        self.groups = expert_groups(self.config, self.options, self._group_score_experts())
        self.by_quantile = self.options.balance == "quantile"
        self.biases_move = True
        self.new_state("expert_bias", torch.zeros(self.config.num_experts, dtype=self.dtype))

    def _check_effects(self) -> None:
        """Raises ConfigError for what would change nothing, and for a router without a gradient."""
        options = self.options
        if self.config.router_topk == 1:
            raise ConfigError(
                "--moe-router-topk 1 with deepseek_v3 leaves every weight at route_scale, and the router without a "
                "gradient; use 2 or more, or --moe-router-type deepseek."
            )
        if options.num_groups is None and options.group_score_experts != 2:
            raise ConfigError(
                f"--moe-router-options group_score_experts={str(options.group_score_experts).lower()} has no effect "
                f"without groups of experts; give num_groups and topk_groups, or leave it out."
            )
        if not options.bias_update_rate and options.bias_update_until != 1:
            raise ConfigError(
                f"--moe-router-options bias_update_until={options.bias_update_until:g} has no effect with "
                f"bias_update_rate=0, which never moves a bias; leave it out."
            )

        if options.balance == "quantile":
            self._check_quantile()

    def _check_quantile(self) -> None:
        """Raises ConfigError for what the quantile rule has no use for."""
        options, choices = self.options, self.config.router_topk
        if options.num_groups is not None:
            raise ConfigError(
                "--moe-router-options balance=quantile knows no groups of experts, for it balances a free choice; "
                "leave out num_groups and topk_groups, or use balance=sign."
            )
        if options.bias_update_rate != DeepSeekV3Options.bias_update_rate:
            raise ConfigError(
                f"--moe-router-options bias_update_rate={options.bias_update_rate:g} has no effect with "
                f"balance=quantile, which sets biases at once; leave it out, or use balance=sign."
            )
        if choices == self.config.num_experts:
            raise ConfigError(
                f"--moe-router-options balance=quantile has nothing to balance where --moe-router-topk {choices} takes "
                f"every expert; use fewer, or leave it out."
            )

    def _group_score_experts(self) -> int:
        """How many experts speak for their group. Raises ConfigError if it has fewer."""
        asked, num, kept = self.options.group_score_experts, self.options.num_groups, self.options.topk_groups
        if num is None or kept is None:
            return 1
        best = max(1, self.config.router_topk // kept) if asked is None else asked
        width = self.config.num_experts // num
        if best > width:
            raise ConfigError(
                f"--moe-router-options group_score_experts={best}: num_groups={num} leaves --num-experts "
                f"{self.config.num_experts} only {width} in a group; use {max(1, width)} or fewer."
            )
        return best

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        # logarithms of the scores, up to a number of each token's own: s / Σ s is their softmax, without a division
        # by a sum that may vanish
        sigmoid = self.options.score == "sigmoid"
        log_scores = F.logsigmoid(logits) if sigmoid else logits
        shares = log_scores.softmax(dim=1)
        scores = (logits.sigmoid() if sigmoid else shares).detach()
        expert_ids = limited_experts(scores + self.expert_bias, self.config.router_topk, self.groups)
        losses = self.aux_losses(logits, shares, None, info)
        if self.options.sequence_loss_coeff and info.train:
            losses["sequence_loss"] = AuxLoss(
                self._sequence_loss(logits, shares, info), self.options.sequence_loss_coeff, per="sequence"
            )
        stats = router_stats(shares, info)
        if self.by_quantile and info.train:
            stats |= quantile_stats(scores, self.expert_bias, self.config.router_topk, info, self.group_axis)
        return self.plan(
            expert_ids,
            log_scores.gather(1, expert_ids).softmax(dim=1) * self.options.route_scale,
            info,
            scores=scores,
            aux_losses=losses,
            stats=stats,
        )

    def _sequence_loss(self, logits: Tensor, shares: Tensor, info: TokenInfo) -> Tensor:
        """This rank's share of Σ_samples Σ_e f_e P_e: a balance loss whose groups are the samples."""
        samples = replace(
            info, groups=info.sequences, num_groups=len(info.sequence_tokens), group_tokens=info.sequence_tokens
        )
        preferred = best_experts(logits, self.config.router_topk)
        return load_balance_loss(shares, preferred, samples, group_axis=self.group_axis, convention="normalised")

    def before_step(self, progress: float) -> None:
        """progress: 0..1 of training."""
        self.biases_move = progress < self.options.bias_update_until

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        """Raise the biases of experts that were asked for less than the mean, lower those of the others."""
        if not self.biases_move:
            return
        if self.by_quantile:
            self.expert_bias.copy_(next_bias(own))
            return
        load = own["requested"]
        # whole numbers: a load equal to the mean is seen as such
        direction = (load.sum() - load * len(load)).sign()
        self.expert_bias.add_(direction.to(self.expert_bias), alpha=self.options.bias_update_rate)
