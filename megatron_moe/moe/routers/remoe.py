"""ReMoE: an expert works for every token whose logit is positive, weighted by that logit; there is no softmax.

Source: Wang et al., arXiv:2412.14711, sections 3.2 to 3.5: g = ReLU(x W); the regulariser Σ_e f_e · mean_t g_te with
f_e = E/(k·T) · count_e; its coefficient, which starts at 1e-8 and is multiplied by 1.2 after each step in which the
share of zeros was below 1 - k/E, and divided by it when it was above. From public code (thu-ml/ReMoE, router.py): the
layers' terms are added up, which the coefficient makes up for. This project's reading: f and the mean are those of a
routing group; the share of zeros is counted over all layers and the whole global batch; a token without an active
expert passes through the residual only.

Guaranteed: differentiable everywhere but at zero; k experts for a token on average once the coefficient has settled
(about 100 steps, in the first of which nearly E/2 are active and memory is needed for them). Dropless in the paper.
Causal: a decision reads one token only, and the coefficient what earlier steps counted.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import option
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import load_balance_loss
from megatron_moe.moe.plan import AuxLoss, RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router


@dataclass(frozen=True, kw_only=True)
class ReMoEOptions:
    """What remoe alone can be told."""

    first_coeff: float = option(1e-8, "coefficient of the regulariser before the first step", above=0)
    coeff_factor: float = option(1.2, "what the coefficient is multiplied or divided by after a step", above=1)


class ReMoERouter(Router):
    """See the file's first lines. State: `coefficient` (), the same in all layers."""

    Options = ReMoEOptions
    is_causal = True
    facts = Facts(
        paper="ReMoE, arXiv:2412.14711",
        chooses="token",
        batch_independent=True,
        scores="ReLU",
        weights="raw score, unbounded",
        capacity="dropless, as many experts as are positive",
        losses=("regulariser, its coefficient adaptive",),
        good_for="routing that is differentiable throughout, with more experts for harder tokens",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_pre_softmax", "aux_loss_coeff", "z_loss_coeff")
    options: ReMoEOptions
    coefficient: Tensor

    def setup(self) -> None:
        super().setup()
        self.new_state("coefficient", torch.tensor(self.options.first_coeff, dtype=self.dtype))

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token on average."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H).  N = T · E, nobody for an expert that is not active."""
        gates = self.logits(tokens).relu()
        experts = torch.arange(self.config.num_experts, device=gates.device).expand_as(gates)
        expert_ids = experts.masked_fill(gates <= 0, self.config.num_experts)
        return self.plan(
            expert_ids,
            gates,
            info,
            scores=gates,
            aux_losses=self._regulariser(gates, expert_ids, info) if info.train else {},
        )

    def _regulariser(self, gates: Tensor, expert_ids: Tensor, info: TokenInfo) -> dict[str, AuxLoss]:
        share = load_balance_loss(gates, expert_ids, info, group_axis=self.group_axis, convention="all_choices")
        return {"relu_regulariser": AuxLoss(share / self.config.router_topk, self.coefficient)}

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        """More pressure where too many experts were active, less where too few."""
        target = 1.0 - self.config.router_topk / self.config.num_experts
        zeros = 1.0 - float(model["requested"].sum()) / max(1.0, float(model["tokens"]) * self.config.num_experts)
        direction = (target > zeros) - (target < zeros)
        self.coefficient.mul_(self.options.coeff_factor**direction)
