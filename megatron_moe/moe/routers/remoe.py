"""ReMoE: an expert works for every token whose logit is positive, weighted by that logit; there is no softmax.

Source: Wang et al., arXiv:2412.14711, sections 3.2 to 3.5. g = ReLU(x W), as many experts as are positive; the
regulariser Σ_e f_e · mean_t g_te with f_e = E/(k·T) · count_e, which is Switch's balance loss in form; its coefficient
starts at 1e-8 and after each step is multiplied by 1.2 if the share of zeros was below 1 - k/E, divided by 1.2 if it
was above. The paper averages the layers' terms (--moe-aux-layer-reduction mean), its code adds them up (thu-ml/ReMoE,
router.py; the default here): the coefficient makes up for the difference. This project's reading: f and the mean are
those of a routing group; the share of zeros is that of all layers and of the step's whole global batch, counted
without rounding and before any capacity, padding left out; the coefficient stays where a float can hold it, for one
that has become 0 would never rise again; there is no z-loss, for there is no softmax.

Guaranteed: answers that do not jump where an expert becomes active; k experts for a token on average once the
coefficient has settled (about 100 steps, in the first of which nearly E/2 are active and memory is needed for them). A
token without an active expert passes through the residual only. All layers and ranks hold the same coefficient.
Dropless in the paper. Causal: a decision reads one token only, and the coefficient what earlier steps counted.
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
    """See the file's first lines. State: `coefficient` () wide, of the regulariser, the same in all layers."""

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
    unused_fields: ClassVar[tuple[str, ...]] = (
        "router_pre_softmax",
        "aux_loss_coeff",
        "z_loss_coeff",
        "slot_priority",  # the experts of a token are not ranked
    )
    options: ReMoEOptions
    coefficient: Tensor

    def setup(self) -> None:
        super().setup()
        self.new_state("coefficient", torch.tensor(self.options.first_coeff, dtype=self.dtype))

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token, on average."""
        return config.router_topk

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H).  N = T · E, nobody for an expert that is not active."""
        gates = self.logits(tokens).relu()
        experts = torch.arange(self.config.num_experts, device=gates.device)
        expert_ids = torch.where(gates > 0, experts, self.config.num_experts)
        losses = {}
        if info.train:
            # E Σ_e f P with all that are active counted: k times the regulariser
            share = load_balance_loss(gates, expert_ids, info, group_axis=self.group_axis, convention="all_choices")
            losses["relu_regulariser"] = AuxLoss(share / self.config.router_topk, self.coefficient)
        return self.plan(expert_ids, gates, info, scores=gates, aux_losses=losses)

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        """More pressure where more than k experts were active for a token, less where fewer: over all layers."""
        # whole numbers: the sign of (1 - k/E) - share of zeros, without its rounding
        surplus = float(model["requested"].sum()) - self.config.router_topk * float(model["tokens"])
        direction = (surplus > 0) - (surplus < 0)
        limits = torch.finfo(self.coefficient.dtype)
        self.coefficient.mul_(self.options.coeff_factor**direction).clamp_(min=limits.tiny, max=limits.max)
