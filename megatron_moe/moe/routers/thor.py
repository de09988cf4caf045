"""THOR: stochastic experts. Nobody learns to route; in training an expert is drawn, each as likely as any other.

Source: Zuo et al., arXiv:2110.04260, section 3, and its public code (microsoft/Stochastic-Mixture-of-Experts): one
draw for the whole batch in each layer and each of two forward passes, whose predictions a consistency loss holds
together, so that experts teach each other. The passes and that loss belong to the objective, not to the router:
--moe-consistency-coeff alpha (5 in the paper's translation recipe) sees each sample twice with other draws.
Evaluation is random as well, one draw for each sentence (the recipe's inference level 1, here `sequence`) or for each
token (level 0). Averaging all experts (`ensemble`) and always using the same one (`fixed`) are this project's.

Granularity in training: `batch` is the paper's. All tokens of a step then use one expert of each layer, so with
--expert-model-parallel-size above 1 all ranks but one wait; `group`, `sequence` and `token` spread the load. The code's
draw on each data-parallel rank would change with the layout: here it is one draw for each routing group
(--moe-routing-group-samples), wherever its tokens are. The expected load is even at every granularity, its variance
is not. The code's sentence-level draw runs along the dimension of time; here it is one for each sample.

Draws in training are keyed by seed, step, layer, pass and what shares the draw; in evaluation by the run's seed, layer
and token or sample, whoever evaluates, so that an evaluation repeats itself and decoding agrees with it.

Guaranteed: each non-padding token has one expert with weight 1, or all with weight 1/E under `ensemble`. No parameters,
no balance loss, no z-loss, and no capacity, which would drop nearly all tokens of a batch that share one expert.
Causal: it reads no token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router
from megatron_moe.parallel.random import KeyedRandom


@dataclass(frozen=True, kw_only=True)
class ThorOptions:
    """What thor alone can be told."""

    granularity: str = option(
        "batch",
        "who shares a draw in training: all tokens of a step (the paper), a routing group, a sample, or nobody",
        choices=("batch", "group", "sequence", "token"),
    )
    inference: str = option(
        "sequence",
        "experts in evaluation: drawn for each sample or token, the mean of all, or always fixed_expert",
        choices=("token", "sequence", "ensemble", "fixed"),
    )
    fixed_expert: int | None = option(None, "for inference=fixed: its index", at_least=0)


class ThorRouter(Router):
    """See the file's first lines."""

    Options = ThorOptions
    is_causal = True
    is_random = True
    facts = Facts(
        paper="THOR, arXiv:2110.04260",
        chooses="nobody",
        batch_independent=True,
        scores="none",
        weights="1; 1/E in an ensemble",
        capacity="dropless",
        losses=("consistency 5 (--moe-consistency-coeff)",),
        good_for="translation and small data: experts that agree, no routing to learn",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_topk", "router_pre_softmax", "aux_loss_coeff", "z_loss_coeff")
    options: ThorOptions

    def setup(self) -> None:
        """Nothing is learned: only the options are checked."""
        inference, fixed = self.options.inference, self.options.fixed_expert
        if inference == "fixed" and fixed is None:
            raise ConfigError("--moe-router-options inference=fixed needs fixed_expert=INDEX; give it.")
        if inference != "fixed" and fixed is not None:
            raise ConfigError(
                f"--moe-router-options fixed_expert={fixed} has no effect with inference={inference}; leave it out, or "
                f"use inference=fixed."
            )
        if fixed is not None and fixed >= self.config.num_experts:
            raise ConfigError(
                f"--moe-router-options fixed_expert={fixed}: --num-experts {self.config.num_experts} has "
                f"0..{self.config.num_experts - 1}."
            )
        for flag in ("expert_capacity_factor", "eval_capacity_factor"):
            factor = getattr(self.config, flag)
            if factor is not None:
                raise ConfigError(
                    f"--moe-{flag.replace('_', '-')} {factor:g} with thor: tokens that share a draw all want one "
                    f"expert, whose places would drop them; leave it out."
                )

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token; E in an evaluation by ensemble."""
        return 1

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H), not looked at."""
        num_experts = self.config.num_experts
        if not info.train and self.options.inference == "ensemble":
            expert_ids = torch.arange(num_experts, device=info.keys.device).expand(len(info.keys), -1)
            weights = torch.full_like(expert_ids, 1.0 / num_experts, dtype=self.dtype)
        else:
            expert_ids = self._experts(info)[:, None]
            weights = torch.ones_like(expert_ids, dtype=self.dtype)
        return self.plan(expert_ids, weights, info)

    def _experts(self, info: TokenInfo) -> Tensor:
        """(T,) int64: the expert of each token."""
        if not info.train and self.options.inference == "fixed":
            assert self.options.fixed_expert is not None
            return torch.full_like(info.keys, self.options.fixed_expert)
        if info.train:
            draws = info.random.at(stream="thor").uniform(self._drawers(info))
        else:
            random = KeyedRandom(self.site.seed, stream="thor/evaluation", layer=self.site.layer)
            draws = random.uniform(info.global_keys if self.options.inference == "token" else info.sample_keys)
        # a draw is at most 1 - 2^-53, and its product with E rounds to less than E
        return (draws * self.config.num_experts).to(torch.int64)

    def _drawers(self, info: TokenInfo) -> Tensor:
        """(T,) int64: equal where a draw is shared, in one step, layer and pass."""
        match self.options.granularity:
            case "batch":
                return info.passes
            case "group":
                # a group's samples follow one another in the run and in `keys`: its first one stands for it
                return info.sample_keys - info.keys % self.config.routing_group_samples
            case "sequence":
                return info.sample_keys
        return info.global_keys
