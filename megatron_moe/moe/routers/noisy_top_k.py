"""Noisy top-k: normal noise on the logits decides, its size learned for each token and expert.

Source: Shazeer et al., arXiv:1701.06538, section 2.1 (KeepTopK of noisy logits, softmax over what is kept), 2.1 and
appendix A (importance and load losses, the squared coefficient of variation; both weights start at zero). The form
`noise=fixed` is V-MoE's (arXiv:2106.05974; google-research/vmoe, nn/routing.py): noise of deviation noise_std / E, the
importance of the noiseless softmax, and a load whose threshold is the k-th largest noisy logit without exclusion. From
memory, not from a text: the weights of the losses, 0.1 for language models and 0.01 for translation. This project's
reading: in both forms the weights are the softmax of the kept noisy logits; the losses are counted over a routing
group; each (token, expert) draws for itself, keyed by the token, so that recomputation repeats it.

Guaranteed: each non-padding token has exactly k different experts, weights sum to 1. Evaluation draws nothing. Causal:
a decision reads one token only. The paper drops nobody; V-MoE has a capacity, and --moe-token-drop-policy bpr.
"""

from dataclasses import dataclass
from typing import ClassVar

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


@dataclass(frozen=True, kw_only=True)
class NoisyTopKOptions:
    """What noisy_top_k alone can be told."""

    noise: str = option("learned", "its deviation: learned (Shazeer), or fixed (V-MoE)", choices=("learned", "fixed"))
    noise_std: float = option(1.0, "fixed noise only: its deviation is this over the number of experts", above=0)
    importance_coeff: float = option(0.1, "weight of the loss on the sums of weights", at_least=0)
    load_coeff: float = option(0.1, "weight of the loss on the expected numbers of tokens", at_least=0)


class NoisyTopKRouter(Router):
    """See the file's first lines."""

    Options = NoisyTopKOptions
    is_causal = True
    is_random = True
    facts = Facts(
        paper="Shazeer et al., arXiv:1701.06538; V-MoE, arXiv:2106.05974",
        chooses="token",
        batch_independent=True,
        scores="softmax after the choice",
        weights="sum to 1",
        capacity="dropless; V-MoE's ceil(k·T/E·CF) by confidence",
        losses=("importance 0.1", "load 0.1"),
        good_for="exploration by noise whose size is learned; the first sparse language models",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_pre_softmax", "aux_loss_coeff")
    options: NoisyTopKOptions

    def setup(self) -> None:
        self._check()
        shape = (self.config.num_experts, self.hidden_size)
        if self.options.noise == "fixed":
            super().setup()
            return
        # both start at zero: noise alone spreads the first tokens evenly
        self.weight = self.new_parameter(shape, Init(constant=0.0))
        self.noise_weight = self.new_parameter(shape, Init(constant=0.0))

    def _check(self) -> None:
        if self.config.router_topk == 1:
            raise ConfigError(
                "--moe-router-topk 1 with noisy_top_k leaves every weight at 1, and the router without a gradient; "
                "use 2 or more, or --moe-router-type switch."
            )
        if self.config.router_topk == self.config.num_experts:
            raise ConfigError(
                f"--moe-router-topk {self.config.router_topk} of --num-experts {self.config.num_experts}: with all of "
                f"them chosen there is no threshold for the load; use fewer, or --moe-router-type top_k."
            )
        if self.options.noise == "learned" and self.options.noise_std != 1.0:
            raise ConfigError(
                f"--moe-router-options noise_std={self.options.noise_std:g} has no effect on learned noise; "
                f"leave it out, or give noise=fixed."
            )

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        noisy, std = (logits, None) if not info.train else self._with_noise(tokens, logits, info)
        expert_ids = best_experts(noisy, self.config.router_topk)
        weights = noisy.gather(1, expert_ids).softmax(dim=1)
        scores = logits.softmax(dim=1)
        losses = self.aux_losses(logits, scores, None, info)
        if std is not None:
            losses |= self._losses(logits, noisy, std, expert_ids, weights, info)
        stats = router_stats(scores, info)
        return self.plan(expert_ids, weights, info, scores=noisy.softmax(dim=1), aux_losses=losses, stats=stats)

    def _with_noise(self, tokens: Tensor, logits: Tensor, info: TokenInfo) -> tuple[Tensor, Tensor]:
        """Noisy logits and the deviation of their noise, (T, E)."""
        draws = info.random.at(stream="noise").uniform_rows(info.global_keys, logits.shape[1])
        normal = torch.special.ndtri(draws).to(self.dtype)
        if self.options.noise == "fixed":
            std = torch.full_like(logits, self.options.noise_std / self.config.num_experts)
        else:
            std = F.softplus(tokens.to(self.dtype) @ self.noise_weight.to(self.dtype).t())
        return logits + normal * std, std

    def _losses(
        self, logits: Tensor, noisy: Tensor, std: Tensor, expert_ids: Tensor, weights: Tensor, info: TokenInfo
    ) -> dict[str, AuxLoss]:
        found = {}
        if self.options.importance_coeff:
            if self.options.noise == "fixed":
                importance = logits.softmax(dim=1)
            else:
                importance = torch.zeros_like(logits).scatter(1, expert_ids, weights)
            found["importance_loss"] = AuxLoss(self._variation(importance, info), self.options.importance_coeff)
        if self.options.load_coeff:
            above = (logits - self._thresholds(noisy)) / std
            load = torch.special.ndtr(above)
            found["load_loss"] = AuxLoss(self._variation(load, info), self.options.load_coeff)
        return found

    def _thresholds(self, noisy: Tensor) -> Tensor:
        """(T, E) what a logit has to exceed to be among the k, the others standing still."""
        k = self.config.router_topk
        largest = noisy.gather(1, best_experts(noisy, k + 1))
        kth, next_one = largest[:, k - 1 : k], largest[:, k:]
        if self.options.noise == "fixed":
            return kth.expand_as(noisy)
        # one that is in falls out when it sinks below the next one
        return torch.where(noisy >= kth, next_one, kth)

    def _variation(self, values: Tensor, info: TokenInfo) -> Tensor:
        """This rank's share of Σ_groups CV²: variance over squared mean of the experts' sums over a whole group.

        values: (T, E) of the local tokens.   A group without tokens has none.
        """
        real = values.masked_fill(info.is_padding[:, None], 0.0)
        sums = values.new_zeros(info.num_groups, values.shape[1]).index_add(0, info.groups, real)
        # every rank computes the same figure of the whole group, and brings its part of it
        sums = copy_to(reduce_from(sums, self.group_axis), self.group_axis)
        mean = sums.mean(dim=1)
        variation = sums.var(dim=1, correction=0) / mean.where(info.group_tokens > 0, 1.0).square()
        return variation.masked_fill(info.group_tokens == 0, 0.0).sum() / self.group_axis.size
