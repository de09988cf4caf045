"""A router that gives each expert as many tokens as any other, on every rank: bytes are then a matter of shapes."""

import torch
from torch import Tensor

from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.top_k import TopKRouter


class UniformRouter(TopKRouter):
    """Row t chooses experts t·K to t·K + K - 1, counted round."""

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        logits = self.logits(tokens)
        scores = logits.softmax(dim=1)
        choices = self.config.router_topk
        places = torch.arange(len(tokens) * choices, device=tokens.device).view(-1, choices)
        expert_ids = places % self.config.num_experts
        return self.plan(
            expert_ids,
            scores.gather(1, expert_ids),
            info,
            scores=scores,
            aux_losses=self.aux_losses(logits, scores, expert_ids, info),
            stats=router_stats(scores, info),
        )
