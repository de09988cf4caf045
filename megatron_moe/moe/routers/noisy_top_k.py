"""Noisy top-k: normal noise on the logits decides, its size learned for each token and expert, or fixed.

Source of noise=learned: Shazeer et al., arXiv:1701.06538, section 2.1 (noisy logits, softmax over the k that are kept),
section 4 and appendix A (importance and load losses). From memory, not from a text: the losses' weights, 0.1 in
language models and 0.01 in translation. That both weights start at zero is what public PyTorch code does, too
(mixture-of-experts by davidmrau and its many copies, which also add 0.01 to the deviation: not done here).
Source of noise=fixed: V-MoE, arXiv:2106.05974, appendix A.2, as in google-research/vmoe, vmoe/nn/routing.py: noise of
deviation noise_std / E. V-MoE itself is noise=fixed with --moe-router-pre-softmax, its weights being raw
probabilities, and with both losses at 0.005 (from memory: half of 0.01 each; the code's own default is 1).

The losses are squared coefficients of variation over the experts, CV² = variance / mean²:
- importance: of the sums of weights (learned), or of the sums of the noiseless softmax (fixed);
- load: of the expected numbers of tokens, Σ_t Phi((z_te - threshold_te) / deviation_te), Phi being the normal
  distribution function and z the noiseless logits: the chance to be among the k if e's noise were drawn again. The
  threshold is the k-th largest noisy logit of the others (learned), or of all (fixed). All three carry gradient.
The balance loss, where one is asked for, is that of vmoe: first choices, softmax of the noisy logits.
This project's reading: sums are taken over a whole routing group, wherever its tokens are; each (token, expert) draws
for itself, keyed by the token, so that recomputation repeats it; a learned deviation is at least 1e-6, for softplus
underflows; the z-loss reads the noiseless logits; the entropy that is logged is that of the noisy softmax.

Guaranteed: each non-padding token has exactly k different experts; weights sum to 1 unless --moe-router-pre-softmax.
Evaluation draws nothing. Causal: a decision reads one token only. Shazeer's rule drops nobody; V-MoE has a capacity,
--moe-expert-capacity-factor, and its batch-prioritised routing, which is not causal, is --moe-token-drop-policy bpr.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import AuxLoss, RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.top_k import best_experts
from megatron_moe.parallel.collectives import copy_to, reduce_from
from megatron_moe.parallel.layout import Init
from megatron_moe.parallel.state import Axis

LEAST_DEVIATION = 1e-6


@dataclass(frozen=True, kw_only=True)
class NoisyTopKOptions:
    """What noisy_top_k alone can be told."""

    noise: str = option(
        "learned",
        "deviation of the noise: learned for each token and expert (Shazeer), or fixed (V-MoE); the losses differ, too",
        choices=("learned", "fixed"),
    )
    noise_std: float = option(
        1.0, "fixed noise only: its deviation times the number of experts; at least 0.001", at_least=1e-3
    )
    importance_coeff: float = option(
        0.1, "weight of the loss on each expert's sum of weights; 0 = off; 0.005 in V-MoE", at_least=0
    )
    load_coeff: float = option(
        0.1, "weight of the loss on each expert's expected number of tokens; 0 = off; 0.005 in V-MoE", at_least=0
    )


class NoisyTopKRouter(Router):
    """See the file's first lines."""

    Options = NoisyTopKOptions
    is_causal = True
    is_random = True
    facts = Facts(
        paper="Shazeer et al., arXiv:1701.06538; V-MoE, arXiv:2106.05974",
        chooses="token",
        batch_independent=True,
        scores="softmax after the choice; before it with --moe-router-pre-softmax",
        weights="sum to 1; raw with --moe-router-pre-softmax",
        capacity="dropless; V-MoE's k·T/E·CF by confidence",
        losses=("importance 0.1", "load 0.1"),
        good_for="exploration by noise whose size is learned: the first sparse language models, and vision",
    )
    options: NoisyTopKOptions

    def setup(self) -> None:
        _check(self.config, self.options)
        self.is_learned = self.options.noise == "learned"
        if not self.is_learned:
            super().setup()
            return
        # both start at zero: noise of deviation ln 2 alone spreads the first tokens evenly
        shape = (self.config.num_experts, self.hidden_size)
        self.weight = self.new_parameter(shape, Init(constant=0.0))
        self.noise_weight = self.new_parameter(shape, Init(constant=0.0))

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        deviation = self._deviation(tokens) if info.train else None
        noisy = logits if deviation is None else logits + deviation * self._draws(info)
        scores = noisy.softmax(dim=1)
        expert_ids = best_experts(noisy, self.config.router_topk)
        raw = self.config.router_pre_softmax
        weights = scores.gather(1, expert_ids) if raw else noisy.gather(1, expert_ids).softmax(dim=1)
        losses = self.aux_losses(logits, scores, expert_ids, info)
        if deviation is not None:
            losses |= self._spread_losses(logits, noisy, deviation, expert_ids, weights, info)
        stats = router_stats(scores, info)
        return self.plan(expert_ids, weights, info, scores=scores, aux_losses=losses, stats=stats)

    def _deviation(self, tokens: Tensor) -> Tensor:
        """Of the noise: (T, E) learned, or () fixed."""
        if not self.is_learned:
            return self.weight.new_full((), self.options.noise_std / self.config.num_experts, dtype=self.dtype)
        raw = tokens.to(self.dtype) @ self.noise_weight.to(self.dtype).t()
        return F.softplus(raw).clamp(min=LEAST_DEVIATION)

    def _draws(self, info: TokenInfo) -> Tensor:
        """(T, E) standard normal."""
        uniform = info.random.at(stream="noise").uniform_rows(info.global_keys, self.config.num_experts)
        normal: Tensor = torch.special.ndtri(uniform)
        return normal.to(self.dtype)

    def _spread_losses(
        self, logits: Tensor, noisy: Tensor, deviation: Tensor, expert_ids: Tensor, weights: Tensor, info: TokenInfo
    ) -> dict[str, AuxLoss]:
        """The losses on how unevenly weights and tokens spread over the experts, as far as the options weigh them."""
        coefficients: dict[str, float] = {}
        parts: list[Tensor] = []  # (T, E) each: what a token adds to the experts' sums
        if self.options.importance_coeff:
            coefficients["importance_loss"] = self.options.importance_coeff
            kept = torch.zeros_like(logits).scatter(1, expert_ids, weights)
            parts.append(kept if self.is_learned else logits.softmax(dim=1))
        if self.options.load_coeff:
            coefficients["load_loss"] = self.options.load_coeff
            parts.append(torch.special.ndtr((logits - self._thresholds(noisy, expert_ids)) / deviation))
        if not parts:
            return {}
        shares = squared_variation(torch.stack(parts, dim=1), info, self.group_axis)
        weighed = zip(coefficients.items(), shares.unbind(), strict=True)
        return {name: AuxLoss(share, coefficient) for (name, coefficient), share in weighed}

    def _thresholds(self, noisy: Tensor, expert_ids: Tensor) -> Tensor:
        """(T, E) or (T, 1): what a logit must exceed to be among the k while the others stand still."""
        kth = noisy.gather(1, expert_ids[:, -1:])
        if not self.is_learned:
            return kth
        # whoever is in falls out only below the first that is not
        chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter_(1, expert_ids, True)
        return torch.where(chosen, noisy.masked_fill(chosen, float("-inf")).amax(dim=1, keepdim=True), kth)


def squared_variation(parts: Tensor, info: TokenInfo, group_axis: Axis) -> Tensor:
    """This rank's share of Σ_groups variance / mean² over the experts' sums in each whole group, for L losses at once.

    parts: (T, L, E) wide, not negative: what each token adds.   Returns (L,); a group without tokens counts 0.
    """
    sums = parts.new_zeros(info.num_groups, *parts.shape[1:])
    sums = sums.index_add(0, info.groups, parts.masked_fill(info.is_padding[:, None, None], 0.0))
    # every rank finds the same figure of the whole sums, and its share is an equal part of it: so what comes back to
    # this rank's tokens are the parts of all ranks, added up
    sums = copy_to(reduce_from(sums, group_axis), group_axis)
    empty = (info.group_tokens == 0)[:, None]
    mean = sums.mean(dim=2).masked_fill(empty, 1.0)
    return (sums.var(dim=2, correction=0) / mean.square()).sum(dim=0) / group_axis.size


def _check(config: MoEConfig, options: NoisyTopKOptions) -> None:
    """Raises ConfigError for what would change nothing, and for a router without a gradient."""
    if config.router_topk == 1 and not config.router_pre_softmax:
        raise ConfigError(
            "--moe-router-topk 1 with noisy_top_k leaves every weight at 1, and the experts' answers without a "
            "gradient to the router; add --moe-router-pre-softmax, or use 2 or more."
        )
    if config.router_topk == config.num_experts and options.load_coeff:
        raise ConfigError(
            f"--moe-router-options load_coeff={options.load_coeff:g} has no effect where --moe-router-topk "
            f"{config.router_topk} takes every expert, for then all loads are the same; use fewer, or load_coeff=0."
        )
    if options.noise == "learned" and options.noise_std != NoisyTopKOptions.noise_std:
        raise ConfigError(
            f"--moe-router-options noise_std={options.noise_std:g} has no effect on learned noise; leave it out, or "
            f"add noise=fixed."
        )
