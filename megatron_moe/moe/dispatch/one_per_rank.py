"""A token travels once to each rank that holds any of its experts; its answers are summed there before the way back.

What SAM (arXiv:2110.07431) and small memory blocks want: the bytes on the wire do not grow with k inside a rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import Dispatcher, ExpertBatch
from megatron_moe.moe.dispatch.visits import Arrived, Visits, bring_home, send_visits
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.ops.permute import Copies, combine, copies_of, permute
from megatron_moe.parallel.collectives import gather_counts, gather_for_partial, nothing, reduce_scatter


@dataclass(frozen=True)
class _WayHome:
    visits: Visits
    parts: list[int]  # rows of each rank of etp
    copies: Copies  # the assignments by expert, of the rows received
    weights: Tensor  # (R,)


class OnePerRankDispatcher(Dispatcher):
    """Sends one row for each (token, rank) pair, with the (expert, weight) pairs beside it."""

    def dispatch(
        self, tokens: Tensor, plan: RoutingPlan, keys: Tensor | None = None, beside: Callable[[], None] = nothing
    ) -> ExpertBatch:
        arrival = send_visits(tokens, plan, self.ep, keys, beside)
        parts = gather_counts(arrival.rows.shape[0], self.etp, tokens.device)
        rows = gather_for_partial(arrival.rows, self.etp, parts)
        who, weights = self._gather_assignments(arrival, parts)
        counts: list[int] = who[:, 1].bincount(minlength=self.local_experts).tolist()
        order = who[:, 1].argsort(stable=True)
        copies = copies_of(who[:, 0][order], rows.shape[0])
        way = _WayHome(arrival.visits, parts, copies, weights.index_select(0, order))
        if arrival.keys is not None:
            keys = self.etp.comm.all_gather(arrival.keys, parts)[copies.token_ids]
        return ExpertBatch(permute(rows, copies), counts, keys, way)

    def _gather_assignments(self, arrival: Arrived, parts: list[int]) -> tuple[Tensor, Tensor]:
        """(A', 2) received (row, local expert) and (A',) weights, of all ranks of etp."""
        plan = arrival.plan
        who = torch.stack([plan.token_ids + sum(parts[: self.etp.rank]), plan.expert_ids], dim=1)
        counts = gather_counts(who.shape[0], self.etp, who.device)
        return self.etp.comm.all_gather(who, counts), gather_for_partial(plan.combine_weights, self.etp, counts)

    def combine(self, answers: Tensor, batch: ExpertBatch) -> Tensor:
        way: _WayHome = batch.way_home
        rows = combine(answers.to(way.weights.dtype), way.weights, way.copies)
        rows = reduce_scatter(rows, self.etp, way.parts).to(answers.dtype)
        return bring_home(rows, way.visits, way.weights.dtype)
