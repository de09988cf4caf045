"""SAM, Switch and Mixture: a token chooses one group of experts, then mixes k experts within it.

Source: Jiang et al., "Towards More Effective and Economic Sparsely-Activated Model", arXiv:2110.07431. From the paper's
abstract: several experts on one device, one device per token, so that the bytes on the wire do not grow with k. From
public code (Hetu, layers/SAMGate.py and its kernels), mode flat:
- p = softmax over all experts; a group counts as the sum of its p; the k largest p of the best group are the weights,
  raw; a bias of the logits (option);
- balance loss: the sum over the k choices of E · Σ_e f_e · P_e, k when balanced;
- alignment loss: Σ_tokens Σ_(e outside the group) max(0, p_e - p_(k)), p_(k) that of the last chosen expert, held
  still: it pushes down what beats the chosen ones elsewhere, and is 0 just when they are the best k of all.
Not followed: that code's kernels take one number for the count of groups and for their width, which agree only when
E = G · G, and it offsets a choice's places by its own count instead of the earlier choices'.
This project's reading, mode hierarchical: q = softmax over groups (Switch), r = softmax within each group (Mixture),
weights q · r. Its losses: Switch's balance loss over groups, by --moe-aux-loss-coeff, and the sum over the k choices of
the same within each group over the tokens that it received, each group weighted by its part of all tokens, so that to
the router of a group this loss stands to the model's as in a Switch layer of that group's own; z-loss of both logits.
Router weights stand on every rank, those of other ranks' groups too: they are few, and the decision needs no exchange.
A mean of the alignment loss over tokens is the default; `sum` adds over a routing group, where that code adds over a
microbatch. Ties go to the first group and the first expert.

Guaranteed: each non-padding token has exactly k different experts, all of one group. With groups that do not straddle
ranks it travels to at most one of them. Nothing is random. Causal: a decision reads one token only.

Places belong to groups, C = CF · T/G tokens each, and within a group nothing is dropped: a token is served with all k
experts or none (the public code: k · ceil(T/E·CF) places for each expert). --moe-token-drop-policy probs prefers the
tokens with the largest weight, bpr those surest of their group. The paper's capacity and coefficients are not known
here; balance 0.01 (--moe-aux-loss-coeff) is Switch's.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import choice_counts, router_stats
from megatron_moe.moe.plan import AuxLoss, RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.top_k import best_experts
from megatron_moe.parallel.layout import ParamLayout, new_parameter

MODES = ("flat", "hierarchical")


@dataclass(frozen=True, kw_only=True)
class SAMOptions:
    """What sam alone can be told."""

    groups: int | None = option(
        None, "expert groups, a divisor of --num-experts: as many as ranks of experts; has to be given", at_least=1
    )
    mode: str = option("flat", "one softmax over all experts, or one over groups and one in each", choices=MODES)
    renormalise: bool = option(
        False, "divide the weights of the k experts by their sum; hierarchical: and multiply by the group's score"
    )
    bias: bool = option(False, "flat: a learned bias of each expert's logit, as in Hetu")
    align_coeff: float = option(0.0, "flat: weight of the alignment loss", at_least=0)
    align_reduction: str = option(
        "mean", "the alignment loss of the tokens of a routing group: mean, or sum as in Hetu", choices=("mean", "sum")
    )
    expert_balance_coeff: float | None = option(
        None, "hierarchical: weight of the balance loss within groups; none = --moe-aux-loss-coeff", at_least=0
    )


class SAMRouter(Router):
    """See the file's first lines. Letters beyond the house's: G groups, W experts in each."""

    Options = SAMOptions
    is_causal = True
    dispatcher = "one_per_rank"
    facts = Facts(
        paper="SAM, arXiv:2110.07431",
        chooses="token",
        batch_independent=True,
        scores="softmax before the choice; hierarchical: over groups, then within one",
        weights="raw score",
        capacity="T/G·CF tokens per group, dropless within it",
        losses=("balance 0.01", "alignment"),
        good_for="many active experts at the traffic of one",
        example={"router_options": {"groups": "2"}},
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_pre_softmax", "capacity_includes_k", "slot_priority")
    options: SAMOptions

    def setup(self) -> None:
        super().setup()
        self.groups = _groups(self.config, self.options)
        self.width = self.config.num_experts // self.groups
        self.expert_pools = self.groups
        self.is_flat = self.options.mode == "flat"
        if self.is_flat:
            _check_flat(self.config, self.options, self.groups)
        else:
            _check_hierarchical(self.config, self.options, self.groups)
            self.group_weight = self.new_weight((self.groups, self.hidden_size), self.init_std)
        if self.options.bias:
            layout = ParamLayout((self.config.num_experts,), sum_over=("tp",), decay=False)
            self.bias = new_parameter(layout, dtype=self.dtype)

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        plan = self._flat(tokens, info) if self.is_flat else self._hierarchical(tokens, info)
        return replace(plan, indivisible=True)

    def _flat(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        logits = self.logits(tokens)
        if self.options.bias:
            logits = logits + self.bias.to(self.dtype)
        scores = logits.softmax(dim=1)
        by_group = logits.unflatten(1, (self.groups, self.width))
        # ranks groups as the sums of their scores do, without their rounding
        group_ids = best_experts(by_group.logsumexp(dim=2), 1)
        inner = _of_group(by_group, group_ids)
        chosen = best_experts(inner, self.config.router_topk)
        expert_ids = group_ids * self.width + chosen
        renormalised = self.options.renormalise
        weights = inner.gather(1, chosen).softmax(dim=1) if renormalised else scores.gather(1, expert_ids)
        losses = self.aux_losses(logits, scores, expert_ids, info, convention="all_choices")
        if self.options.align_coeff and info.train:
            losses["alignment_loss"] = self._alignment(scores, expert_ids, info)
        return self.plan(
            expert_ids,
            weights,
            info,
            scores=scores.unflatten(1, (self.groups, self.width)).sum(dim=2),
            aux_losses=losses,
            stats=router_stats(scores, info),
        )

    def _hierarchical(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        group_logits = tokens.to(self.dtype) @ self.group_weight.to(self.dtype).t()
        group_scores = group_logits.softmax(dim=1)
        group_ids = best_experts(group_logits, 1)
        by_group = self.logits(tokens).unflatten(1, (self.groups, self.width))
        inner = _of_group(by_group, group_ids)
        chosen = best_experts(inner, self.config.router_topk)
        inner_scores = inner.softmax(dim=1)
        renormalised = self.options.renormalise
        shares = inner.gather(1, chosen).softmax(dim=1) if renormalised else inner_scores.gather(1, chosen)
        expert_ids = group_ids * self.width + chosen
        losses = self._losses_of_both(group_logits, inner, group_scores, group_ids, info)
        coeff = self.options.expert_balance_coeff
        coeff = self.config.aux_loss_coeff if coeff is None else coeff
        if coeff and info.train:
            share = self._expert_balance(inner_scores, group_ids, expert_ids, info)
            losses["expert_balance_loss"] = AuxLoss(share, coeff)
        all_scores = (group_scores.detach()[:, :, None] * by_group.detach().softmax(dim=2)).flatten(1)
        return self.plan(
            expert_ids,
            group_scores.gather(1, group_ids) * shares,
            info,
            scores=group_scores,
            aux_losses=losses,
            stats=router_stats(all_scores, info),
        )

    def _alignment(self, scores: Tensor, expert_ids: Tensor, info: TokenInfo) -> AuxLoss:
        """scores: (T, E).   expert_ids: (T, K), best first."""
        last = scores.gather(1, expert_ids[:, -1:]).detach()
        experts = torch.arange(scores.shape[1], device=scores.device)
        inside = experts // self.width == expert_ids[:, :1] // self.width
        excess = (scores - last).relu().masked_fill(inside | info.is_padding[:, None], 0.0)
        per = "token" if self.options.align_reduction == "mean" else "group"
        return AuxLoss(excess.sum(), self.options.align_coeff, per=per)

    def _losses_of_both(
        self, group_logits: Tensor, inner: Tensor, group_scores: Tensor, group_ids: Tensor, info: TokenInfo
    ) -> dict[str, AuxLoss]:
        """The balance loss over groups; the z-losses of groups and of the experts within the chosen one, added up."""
        losses = self.aux_losses(group_logits, group_scores, group_ids, info)
        within = self.aux_losses(inner, inner, None, info)
        return losses | {name: replace(loss, share=losses[name].share + loss.share) for name, loss in within.items()}

    def _expert_balance(self, inner_scores: Tensor, group_ids: Tensor, expert_ids: Tensor, info: TokenInfo) -> Tensor:
        """This rank's share of Σ_groups Σ_g T_g/T · W · Σ_(e in g) f_e · P_e: K when balanced.

        T_g: the routing group's tokens that chose g, on all ranks; f_e, P_e: the part of them that chose e, and the
        mean of their scores for it.   inner_scores: (T, W) wide.   group_ids: (T, 1).   expert_ids: (T, K).
        """
        axis, dtype = self.group_axis, inner_scores.dtype
        chosen = choice_counts(expert_ids, info, num_experts=self.config.num_experts, group_axis=axis)
        arrived = choice_counts(group_ids, info, num_experts=self.groups, group_axis=axis).clamp(min=1)
        fraction = chosen.unflatten(1, (self.groups, self.width)).to(dtype) / arrived.to(dtype)[:, :, None]
        # T_g/T · P_e is a sum over tokens divided by T: no mean has to be exchanged
        tokens = info.group_tokens.clamp(min=1).to(dtype)[:, None, None]
        slope: Tensor = (self.width * fraction / tokens)[info.groups, group_ids[:, 0]]
        return (inner_scores * slope.masked_fill(info.is_padding[:, None], 0.0)).sum()


def _of_group(by_group: Tensor, group_ids: Tensor) -> Tensor:
    """(T, G, W), (T, 1) -> (T, W): each token's values of its own group."""
    return by_group.take_along_dim(group_ids[:, :, None], dim=1).squeeze(1)


def _groups(config: MoEConfig, options: SAMOptions) -> int:
    """Raises ConfigError for groups that cannot be."""
    experts, groups, choices = config.num_experts, options.groups, config.router_topk
    if groups is None:
        raise ConfigError(
            "--moe-router-type sam has to know the groups of experts, of which a token visits one: add "
            "--moe-router-options groups=G, a divisor of --num-experts "
            f"{experts}; best a multiple of --expert-model-parallel-size, so that no group straddles ranks."
        )
    if experts % groups:
        raise ConfigError(
            f"--moe-router-options groups={groups}: --num-experts {experts} cannot be cut into so many equal groups; "
            f"use a divisor of {experts}."
        )
    if choices > experts // groups:
        raise ConfigError(
            f"--moe-router-topk {choices} asks for more experts than the {experts // groups} of a group "
            f"(groups={groups} of --num-experts {experts}); use fewer choices, or at most {experts // choices} groups."
        )
    if options.align_reduction != "mean" and not options.align_coeff:
        raise ConfigError(
            f"--moe-router-options align_reduction={options.align_reduction} has no effect without an alignment loss; "
            f"give align_coeff too, or leave it out."
        )
    return groups


def _check_flat(config: MoEConfig, options: SAMOptions, groups: int) -> None:
    """Raises ConfigError for what would change or learn nothing."""
    if options.expert_balance_coeff is not None:
        raise ConfigError(
            f"--moe-router-options expert_balance_coeff={options.expert_balance_coeff:g} has no effect with mode=flat, "
            f"which has one balance loss (--moe-aux-loss-coeff); leave it out, or add mode=hierarchical."
        )
    if options.renormalise and config.router_topk == 1:
        raise ConfigError(
            "--moe-router-options renormalise=true with --moe-router-topk 1 leaves every weight at 1, and the router "
            "without a gradient; use 2 experts or more, or leave it out."
        )
    if options.align_coeff and groups in (1, config.num_experts):
        raise ConfigError(
            f"--moe-router-options align_coeff={options.align_coeff:g} has no effect with groups={groups}: the chosen "
            f"experts are always the best ones; leave it out, or use another number of groups."
        )


def _check_hierarchical(config: MoEConfig, options: SAMOptions, groups: int) -> None:
    """Raises ConfigError for what would change or learn nothing."""
    for name, value in (("bias", "true"), ("align_coeff", f"{options.align_coeff:g}")):
        if getattr(options, name):
            raise ConfigError(
                f"--moe-router-options {name}={value} has no effect with mode=hierarchical; leave it out, or use "
                f"mode=flat."
            )
    if groups in (1, config.num_experts):
        kind = "group" if groups == 1 else "expert in each group"
        raise ConfigError(
            f"--moe-router-options mode=hierarchical groups={groups}: with one {kind} to choose, the choice has no "
            f"gradient; use mode=flat, or another number of groups."
        )
    if config.router_topk == config.num_experts // groups:
        for name in ("renormalise", "expert_balance_coeff"):
            value = getattr(options, name)
            if value:
                raise ConfigError(
                    f"--moe-router-options {name}={str(value).lower()} has no effect with mode=hierarchical and "
                    f"--moe-router-topk {config.router_topk}, which takes all experts of a group; leave it out, or use "
                    f"fewer groups."
                )
    if options.renormalise and config.router_topk == 1:
        raise ConfigError(
            "--moe-router-options renormalise=true mode=hierarchical with --moe-router-topk 1 leaves the router within "
            "the groups without a gradient; use 2 experts or more, or leave it out."
        )
