"""Top-k by the cosine between token and expert, with a learned temperature (X-MoE, arXiv:2204.09179, section 3.1)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router
from megatron_moe.parallel.layout import Init


@dataclass(frozen=True, kw_only=True)
class CosineOptions:
    first_temperature: float = option(0.3, "what cosines are divided by at the start", above=0)


class CosineRouter(Router):
    Options = CosineOptions
    is_causal = True
    facts = Facts(
        paper="X-MoE, arXiv:2204.09179", chooses="token", batch_independent=True, scores="softmax of cosines",
        weights="raw score", capacity="as configured", good_for="keeping token states from collapsing onto experts",
    )  # fmt: skip

    def setup(self) -> None:
        super().setup()
        self.temperature = self.new_parameter((1,), Init(constant=self.options.first_temperature))

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        cosines = F.normalize(tokens.to(self.dtype), dim=1) @ F.normalize(self.weight, dim=1).t()
        logits = cosines / self.temperature
        scores = logits.softmax(dim=1)
        weights, experts = scores.topk(self.config.router_topk, dim=1)
        losses = self.aux_losses(logits, scores, experts, info)
        return self.plan(experts, weights, info, scores=scores, aux_losses=losses, stats=router_stats(scores, info))
