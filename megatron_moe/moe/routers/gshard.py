"""GShard top-2: the best expert always, the second one at random in proportion to its weight.

Source: Lepikhin et al., arXiv:2006.16668, section 2.2 and algorithm 1. With p = softmax of the logits and g1, g2 the
two largest divided by their sum, the second expert is used with probability min(1, 2 · g2) in training. From public
code (fairseq, branch moe, modules/moe/top2gate.py): the policies `all` and `sampling` (the second expert is the largest
logit plus Gumbel noise among the others), and the balance loss over first choices. Renormalising before dropping is
Mesh-TensorFlow's order: a partner dropped for lack of places leaves weights that sum to less than 1; `after_drop` is
fairseq's; `none` keeps the raw probabilities (flaxformer). This project's reading: evaluation always takes the second
largest and always uses it.

Guaranteed: each non-padding token has one or two different experts. The paper's capacity is 2 · ceil(T / E), first
choices before second ones: --moe-slot-priority k_major, which looks into the future when places run out; token_major,
the default, does not. Causal under token_major or without a capacity.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.top_k import best_experts


@dataclass(frozen=True, kw_only=True)
class GShardOptions:
    """What gshard alone can be told."""

    second_policy: str = option(
        "random",
        "the second expert in training: with probability 2·g2, always, or drawn in proportion to the scores",
        choices=("random", "all", "sampling"),
    )
    renormalise: str = option(
        "before_drop",
        "make weights sum to 1 before places run out, those that are left afterwards, or keep raw probabilities",
        choices=("before_drop", "after_drop", "none"),
    )


class GShardRouter(Router):
    """See the file's first lines."""

    Options = GShardOptions
    is_causal = True
    facts = Facts(
        paper="GShard, arXiv:2006.16668",
        chooses="token",
        batch_independent=True,
        scores="softmax before the choice",
        weights="sum to 1",
        capacity="2·ceil(T/E), first choices first",
        losses=("balance 0.01",),
        good_for="top-2 with a random second expert, the baseline of many papers",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_topk", "router_pre_softmax")
    options: GShardOptions

    def setup(self) -> None:
        super().setup()
        self.is_random = self.options.second_policy != "all"

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token, at most."""
        return 2

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        scores = logits.softmax(dim=1)
        policy = self.options.second_policy if info.train else "all"
        expert_ids = self._sampled_pair(logits, info) if policy == "sampling" else best_experts(logits, 2)
        # g1, g2: the pair's probabilities divided by their sum
        shares = logits.gather(1, expert_ids).softmax(dim=1)
        used = expert_ids
        if policy == "random":
            draws = info.random.at(stream="second_expert").uniform(info.global_keys)
            passed_over = 2.0 * shares[:, 1].detach() <= draws
            first, second = expert_ids.unbind(dim=1)
            used = torch.stack([first, second.masked_fill(passed_over, self.config.num_experts)], dim=1)
        return self.plan(
            used,
            shares if self.options.renormalise == "before_drop" else scores.gather(1, expert_ids),
            info,
            scores=scores,
            renormalise=self.options.renormalise == "after_drop",
            aux_losses=self.aux_losses(logits, scores, expert_ids, info),
            stats=router_stats(scores, info),
        )

    def _sampled_pair(self, logits: Tensor, info: TokenInfo) -> Tensor:
        """(T, 2): the best expert, and one of the others drawn in proportion to its score (Gumbel-max)."""
        draws = info.random.at(stream="second_expert").uniform_rows(info.global_keys, logits.shape[1])
        first = best_experts(logits, 1)
        noisy = logits.detach() - (-draws.log()).log().to(logits.dtype)
        return torch.cat([first, best_experts(noisy.scatter(1, first, float("-inf")), 1)], dim=1)
