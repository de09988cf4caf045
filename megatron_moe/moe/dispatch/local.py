"""All experts whole on this rank: a permutation."""

from dataclasses import dataclass

from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import Dispatcher, ExpertBatch
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.ops.permute import combine, permute, unpermute


@dataclass(frozen=True)
class _WayHome:
    plan: RoutingPlan
    order: Tensor  # (R,) assignments by expert


def by_expert(plan: RoutingPlan) -> tuple[Tensor, list[int]]:
    """Assignments sorted by expert, nobody's left out, and how many each expert has. Waits for the device."""
    counts: list[int] = plan.tokens_per_expert().tolist()
    order = plan.expert_ids.argsort(stable=True)[: sum(counts)]
    return order, counts


class LocalDispatcher(Dispatcher):
    """Permutes, computes, permutes back."""

    def dispatch(self, tokens: Tensor, plan: RoutingPlan) -> ExpertBatch:
        order, counts = by_expert(plan)
        rows = permute(tokens, plan.token_ids, order, plan.choices)
        return ExpertBatch(rows, counts, _WayHome(plan, order))

    def combine(self, answers: Tensor, batch: ExpertBatch) -> Tensor:
        way: _WayHome = batch.way_home
        plan = way.plan
        home = unpermute(answers, way.order, plan.token_ids.shape[0])
        return combine(home, plan.combine_weights, plan.token_ids, plan.num_tokens, plan.choices)
