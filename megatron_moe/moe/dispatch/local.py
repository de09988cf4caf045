"""All experts whole on this rank: a permutation."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import Dispatcher, ExpertBatch
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.ops.permute import Copies, combine, copies_of, permute
from megatron_moe.parallel.collectives import nothing


@dataclass(frozen=True)
class _WayHome:
    copies: Copies
    weights: Tensor  # (R,)


def by_expert(plan: RoutingPlan) -> tuple[Tensor, list[int]]:
    """Assignments sorted by expert, nobody's left out, and how many each expert has. Waits for the device."""
    counts: list[int] = plan.tokens_per_expert().tolist()
    order = plan.expert_ids.argsort(stable=True)[: sum(counts)]
    return order, counts


class LocalDispatcher(Dispatcher):
    """Brings rows into expert order, and adds up the answers from there."""

    def dispatch(
        self, tokens: Tensor, plan: RoutingPlan, keys: Tensor | None = None, beside: Callable[[], None] = nothing
    ) -> ExpertBatch:
        beside()
        order, counts = by_expert(plan)
        copies = copies_of(plan.token_ids[order], plan.num_tokens)
        weights = plan.combine_weights.index_select(0, order)
        keys = None if keys is None else keys[copies.token_ids]
        return ExpertBatch(permute(tokens, copies), counts, keys, _WayHome(copies, weights))

    def combine(self, answers: Tensor, batch: ExpertBatch) -> Tensor:
        way: _WayHome = batch.way_home
        return combine(answers, way.weights, way.copies)
