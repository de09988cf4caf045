"""What a router adds to the model's loss, and what it tells of itself. All arithmetic is wide (the scores' dtype)."""

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.plan import AuxLoss, TokenInfo
from megatron_moe.parallel.collectives import sum_over
from megatron_moe.parallel.state import Axis

# what f counts: the first choice only; each of the K choices (K when balanced); each, divided by K
BALANCE_CONVENTIONS = ("first_choice", "all_choices", "normalised")


def choice_counts(expert_ids: Tensor, info: TokenInfo, *, num_experts: int, group_axis: Axis) -> Tensor:
    """(num_groups, E) int64: choices of each expert by the non-padding tokens of each whole group, on all ranks.

    expert_ids: (T, K) int64; num_experts counts for nobody.
    """
    chosen = expert_ids.masked_fill(info.is_padding[:, None], num_experts)
    buckets = (info.groups[:, None] * (num_experts + 1) + chosen).reshape(-1)
    # not bincount, which waits for the device to learn its length
    counts = buckets.new_zeros(info.num_groups * (num_experts + 1))
    counts.scatter_add_(0, buckets, torch.ones_like(buckets))
    return sum_over(counts.view(info.num_groups, num_experts + 1)[:, :num_experts].contiguous(), group_axis)


def load_balance_loss(
    scores: Tensor, expert_ids: Tensor, info: TokenInfo, *, group_axis: Axis, convention: str
) -> Tensor:
    """This rank's share of Σ_groups E · Σ_e f_e · P_e.  [Switch, arXiv:2101.03961, eq. 4-6; GShard, arXiv:2006.16668]

    f_e: the part of the group's tokens that chose e, P_e: their mean score for e, both over the non-padding tokens of
    the whole group, wherever they are.  1 when f or P is uniform (K under "all_choices"); it can be less than 1.
    scores: (T, E) wide, rows sum to 1.   expert_ids: (T, K) int64, best first, before policies and capacity.
    convention: one of BALANCE_CONVENTIONS: "first_choice" is Mesh-TensorFlow's, GShard's and ST-MoE's, "all_choices"
    flaxformer's, "normalised" Megatron's.  Returns () wide.  f only counts; P carries the gradient.
    """
    num_experts = scores.shape[1]
    chosen = expert_ids[:, :1] if convention == "first_choice" else expert_ids
    counts = choice_counts(chosen, info, num_experts=num_experts, group_axis=group_axis).to(scores.dtype)
    tokens = info.group_tokens.clamp(min=1).to(scores.dtype)[:, None]
    fraction = counts / (tokens * expert_ids.shape[1] if convention == "normalised" else tokens)
    # a token's score for e counts with E · f_e / tokens: a sum over local tokens, so no mean has to be exchanged
    slope = (num_experts * fraction / tokens)[info.groups].masked_fill(info.is_padding[:, None], 0.0)
    return (scores * slope).sum()


def z_loss(logits: Tensor, info: TokenInfo) -> Tensor:
    """This rank's share of Σ_tokens (ln Σ_e exp z_e)^2 over non-padding tokens.  [ST-MoE, arXiv:2202.08906, eq. 5]

    logits: (T, E) wide.  Returns () wide, a sum: AuxLoss(per="token") makes the mean of it.
    """
    return logits.logsumexp(dim=1).masked_fill(info.is_padding, 0.0).square().sum()


def router_losses(
    logits: Tensor,
    scores: Tensor,
    expert_ids: Tensor | None,
    info: TokenInfo,
    *,
    config: MoEConfig,
    group_axis: Axis,
    convention: str = "first_choice",
) -> dict[str, AuxLoss]:
    """The balance loss and the z-loss as far as the config weighs them; none in evaluation.

    Arguments as above; expert_ids None: a rule that is balanced by itself.
    """
    losses: dict[str, AuxLoss] = {}
    if config.aux_loss_coeff and info.train and expert_ids is not None:
        share = load_balance_loss(scores, expert_ids, info, group_axis=group_axis, convention=convention)
        losses["load_balance_loss"] = AuxLoss(share, config.aux_loss_coeff)
    if config.z_loss_coeff and info.train:
        losses["z_loss"] = AuxLoss(z_loss(logits, info), config.z_loss_coeff, per="token")
    return losses


def router_stats(scores: Tensor, info: TokenInfo) -> dict[str, Tensor]:
    """Sums over this rank's non-padding tokens, detached: "entropy_sum" (nats) and "confidence_sum" (the top score)."""
    scores = scores.detach()
    entropy = torch.special.entr(scores).sum(dim=1)
    confidence = scores.amax(dim=1)
    return {
        "entropy_sum": entropy.masked_fill(info.is_padding, 0.0).sum(),
        "confidence_sum": confidence.masked_fill(info.is_padding, 0.0).sum(),
    }
