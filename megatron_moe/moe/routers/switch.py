"""Switch: each token goes to its one best expert, weighted by that expert's probability.

Source: Fedus et al., arXiv:2101.03961, section 2.1 and 2.2 (routing, balance loss), 2.4 (float32), appendix C (jitter).
The weight is the raw probability p of the winner, not 1: it alone gives the router a gradient. Jitter multiplies the
router's input by a number between 1 - eps and 1 + eps, in training only: so the appendix and the public code
(Mesh-TensorFlow `switch_jitter`, flaxformer); the pseudo-code of figure 15, which adds noise to logits, is not
followed.
This project's reading: jitter is drawn for each (token, feature), keyed by the token, so recomputation repeats it.

Guaranteed: each non-padding token has one expert. The paper's capacity (1.0 to 1.25 in training, 2.0 in evaluation,
left to right) is set by --moe-expert-capacity-factor; its balance loss weighs 0.01. Causal.
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
class SwitchOptions:
    """What switch alone can be told."""

    jitter_eps: float = option(
        1e-2, "training only: the router's input is multiplied by 1 - eps to 1 + eps; 0 = off", at_least=0, below=1
    )


class SwitchRouter(Router):
    """See the file's first lines."""

    Options = SwitchOptions
    is_causal = True
    facts = Facts(
        paper="Switch, arXiv:2101.03961",
        chooses="token",
        batch_independent=True,
        scores="softmax before the choice",
        weights="raw score",
        capacity="T/E·CF, CF 1.25 in training, 2 in evaluation",
        losses=("balance 0.01",),
        good_for="least computation and traffic: one expert for each token",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_topk", "router_pre_softmax")
    options: SwitchOptions

    def setup(self) -> None:
        super().setup()
        self.is_random = self.options.jitter_eps > 0

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token."""
        return 1

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        hidden = tokens.to(self.dtype)
        if info.train and self.options.jitter_eps:
            hidden = hidden * (1.0 + self.options.jitter_eps * self._noise(info))
        logits = self.logits(hidden)
        scores = logits.softmax(dim=1)
        expert_ids = best_experts(logits, 1)
        return self.plan(
            expert_ids,
            scores.gather(1, expert_ids),
            info,
            scores=scores,
            aux_losses=self.aux_losses(logits, scores, expert_ids, info),
            stats=router_stats(scores, info),
        )

    def _noise(self, info: TokenInfo) -> Tensor:
        """(T, H) uniform in (-1, 1), in steps of 2^-15: four features share the 64 bits of one draw."""
        random = info.random.at(stream="jitter")
        words = torch.arange(-(-self.hidden_size // 4), device=info.global_keys.device)
        draws = random.bits(random.bits(info.global_keys)[:, None] + words)
        quarters = draws.view(torch.int16)[:, : self.hidden_size]
        return (quarters.to(self.dtype) + 0.5) * 2.0**-15
