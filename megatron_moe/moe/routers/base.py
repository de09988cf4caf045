"""BASE: tokens are assigned to experts with equal loads, so that the sum of scores is as large as can be.

Source: Lewis et al., arXiv:2103.16716; what the paper leaves open follows its public code (fairseq,
modules/base_layer.py): the assignment is made without gradient, evaluation takes each token's best expert, a score that
is not finite counts as the smallest finite one, and the expert's row of weights learns through the weight alone.

The paper's layer answers a · f(x) + (1 - a) · x with a = sigmoid(x · w_e), f being a residual layer: f(x) = x + FFN(x).
That is x + a · FFN(x): a plan of weight a under the residual that stands around every sparse layer here.

This project's reading. The tokens of one assignment are those of a routing group, not those of a worker; the paper
shuffles tokens over workers so that a worker's are not all alike, which a group of several samples
(--moe-routing-group-samples) does too. Loads are T/E, its floor or ceil where it is no whole number. Padding is not
assigned. The paper begins with orthogonal rows of length 0.1; here numbers are drawn one by one, so that they do not
depend on the layout: normal, of deviation 0.1 / sqrt(H), which makes rows of about that length and, for H much larger
than E, nearly orthogonal. The solver is exact (assignment.py), where fairseq's auction is not.

Guaranteed in training: loads of a group that differ by at most one, and no other such assignment of a larger total.
In evaluation: one expert for each token, independent of all other tokens, the loads as they come. Not causal in
training: where a token goes depends on later tokens, and on other sequences of its group; so training also differs from
evaluation. The paper has no capacity and no auxiliary loss; the z-loss is allowed.
"""

from typing import ClassVar

from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.capacity import FILLED
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_stats
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.assignment import balanced_assignment
from megatron_moe.moe.routers.group_table import group_table
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.routers.top_k import best_experts

_ROW_LENGTH = 0.1  # the gain of the paper's code


class BaseRouter(Router):
    """See the file's first lines."""

    is_causal = False
    facts = Facts(
        paper="BASE, arXiv:2103.16716",
        chooses="joint",
        batch_independent=True,
        scores="sigmoid",
        weights="sigmoid of the expert's own logit",
        capacity="exactly T/E in training, dropless in evaluation",
        good_for="perfect balance in training without a loss or a coefficient; one expert for each token",
    )
    unused_fields: ClassVar[tuple[str, ...]] = ("router_topk", *FILLED)

    def setup(self) -> None:
        self.weight = self.new_weight((self.config.num_experts, self.hidden_size), _ROW_LENGTH / self.hidden_size**0.5)

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token."""
        return 1

    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H)."""
        logits = self.logits(tokens)
        expert_ids = self._assigned(logits, info) if info.train else best_experts(logits, 1)
        return self.plan(
            expert_ids,
            logits.gather(1, expert_ids).sigmoid(),
            info,
            aux_losses=self.aux_losses(logits, logits, None, info),
            stats=router_stats(logits.softmax(dim=1), info),
        )

    def _assigned(self, logits: Tensor, info: TokenInfo) -> Tensor:
        """(T, 1) int64; anything for padding."""
        table = group_table(logits, info, self.group_axis)
        experts = balanced_assignment(table.scores, table.is_token)
        return table.local(experts)[:, None].clamp(max=self.config.num_experts - 1)
