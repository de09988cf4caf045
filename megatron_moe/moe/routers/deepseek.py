"""DeepSeekMoE and DeepSeek-V2: many small experts with raw softmax weights, and balance at three levels.

Source: DeepSeekMoE, arXiv:2401.06066, section 3; DeepSeek-V2, arXiv:2405.04434, section 2.2, whose equations, as far as
they are named here, were read in the paper's text:
- weights are the scores themselves, a softmax over all routed experts, times route_scale (2.2.1). The factor is not in
  the papers: 1 for the 16B models and 16 for the 236B model in the public configurations (deepseek-ai/DeepSeek-V3).
- device-limited routing (2.2.2): the M groups with the largest scores, then the best experts within these.
- three losses (2.2.3). Expert-level (eq. 23-25) is --moe-aux-loss-coeff, normalised by k. Device-level (eq. 26-28):
  Σ_d f'_d P'_d with f'_d the mean of f over the group's experts and P'_d the sum of P. Communication (eq. 29-31):
  f''_d = D / (M·T) times the number of tokens sent to d, P''_d = P'_d. All are 1 when loads or scores are even.
- places (2.2.4): a group's experts share capacity factor times their even part of all assignments, the lowest scores
  dropped first; each assignment goes by itself.
This project's reading: T is a routing group, by default one sample, which is the paper's sequence; "sent to d" means
that at least one chosen expert is there, before places run out. Not followed: the paper keeps all tokens of about one
sequence in ten from being dropped.

Guaranteed: each non-padding token has exactly k different experts from at most M groups. Nothing is random. Causal: a
decision reads one token only; but dropping by score compares tokens of all positions (it asks for
--moe-allow-noncausal), while --moe-token-drop-policy position does not.

Which flags make the published models (shared experts are one of their common width):
- DeepSeekMoE 16B: --num-experts 64 --moe-router-topk 6 --moe-ffn-hidden-size 1408
  --moe-shared-expert-intermediate-size 2816 --moe-layer-freq 0,1,1,... (the first layer is dense)
- DeepSeek-V2 236B: --num-experts 160 --moe-router-topk 6 --moe-ffn-hidden-size 1536
  --moe-shared-expert-intermediate-size 3072 --moe-layer-freq 0,1,1,... --moe-aux-loss-coeff 0.003
  --moe-router-options num_groups=8 topk_groups=3 route_scale=16 device_loss_coeff=0.05 communication_loss_coeff=0.02
  and for its drops --moe-expert-capacity-factor 1 --moe-eval-capacity-factor 8 (places for all)
  --moe-token-drop-policy probs --moe-allow-noncausal
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import load_balance_loss, router_stats
from megatron_moe.moe.plan import AuxLoss, RoutingPlan, TokenInfo
from megatron_moe.moe.routers.group_limited import ExpertGroups, GroupOptions, expert_groups, limited_experts
from megatron_moe.moe.routers.router import Router


@dataclass(frozen=True, kw_only=True)
class DeepSeekOptions(GroupOptions):
    """What deepseek alone can be told."""

    route_scale: float = option(1.0, "factor on all weights; 16 in DeepSeek-V2", above=0)
    device_loss_coeff: float = option(0.0, "weight of the balance loss over groups; 0.05 in DeepSeek-V2", at_least=0)
    communication_loss_coeff: float = option(
        0.0, "weight of the balance loss over tokens sent to groups; 0.02 in DeepSeek-V2", at_least=0
    )


class DeepSeekRouter(Router):
    """See the file's first lines."""

    Options = DeepSeekOptions
    is_causal = True
    dispatcher = "one_per_rank"  # a token travels once to each of its devices, whatever it asks of them
    facts = Facts(
        paper="DeepSeekMoE, arXiv:2401.06066; DeepSeek-V2, arXiv:2405.04434",
        chooses="token",
        batch_independent=True,
        scores="softmax before the choice",
        weights="raw score · route_scale",
        capacity="dropless; k·T/D·CF for each of D groups, CF 1 in training, all in evaluation",
        losses=("balance 0.003", "device 0.05", "communication 0.02"),
        good_for="many small experts, and a bound on the devices that a token visits",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_pre_softmax",)
    options: DeepSeekOptions
    groups: ExpertGroups | None

    def setup(self) -> None:
        super().setup()
        self.groups = expert_groups(self.config, self.options)
        self._check_effects()
        self.expert_pools = self.options.num_groups

    def _check_effects(self) -> None:
        """Raises ConfigError for what would change nothing."""
        if self.groups is None:
            for name in ("device_loss_coeff", "communication_loss_coeff"):
                if getattr(self.options, name):
                    raise ConfigError(
                        f"--moe-router-options {name}={getattr(self.options, name):g} has no effect without groups of "
                        f"experts; give num_groups and topk_groups, or leave it out."
                    )
        elif not self.config.capacity_includes_k:
            raise ConfigError(
                "--no-moe-capacity-includes-k has no effect with num_groups, for the places of a group count every "
                "expert of a token; leave it out."
            )

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        scores = logits.softmax(dim=1)
        # logits rank experts and groups as their scores do, without their rounding
        expert_ids = limited_experts(logits, self.config.router_topk, self.groups)
        losses = self.aux_losses(logits, scores, expert_ids, info, convention="normalised")
        if self.groups is not None and info.train:
            losses |= self._group_losses(scores, expert_ids, info, self.groups)
        return self.plan(
            expert_ids,
            scores.gather(1, expert_ids) * self.options.route_scale,
            info,
            scores=scores,
            aux_losses=losses,
            stats=router_stats(scores, info),
        )

    def _group_losses(
        self, scores: Tensor, expert_ids: Tensor, info: TokenInfo, groups: ExpertGroups
    ) -> dict[str, AuxLoss]:
        """The device-level and the communication loss, as far as they are weighed.

        Both are load_balance_loss with groups in the place of experts: the mean of f over a group's E/D experts is
        D / (k·T) times what its experts were chosen together.
        """
        losses: dict[str, AuxLoss] = {}
        group_scores = scores.unflatten(1, (groups.num, groups.width)).sum(dim=2)
        group_ids = expert_ids // groups.width
        if self.options.device_loss_coeff:
            share = load_balance_loss(
                group_scores, group_ids, info, group_axis=self.group_axis, convention="normalised"
            )
            losses["device_loss"] = AuxLoss(share, self.options.device_loss_coeff)
        if self.options.communication_loss_coeff:
            # a token counts once for each group, however many experts it has there
            visited = group_ids.sort(dim=1).values
            visited[:, 1:].masked_fill_(visited.diff(dim=1) == 0, groups.num)
            share = load_balance_loss(group_scores, visited, info, group_axis=self.group_axis, convention="all_choices")
            losses["communication_loss"] = AuxLoss(share / groups.kept, self.options.communication_loss_coeff)
        return losses
