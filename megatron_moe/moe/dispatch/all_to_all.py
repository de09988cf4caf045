"""Permute, exchange over ep, gather over etp, group by expert; and back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import Dispatcher, ExpertBatch
from megatron_moe.moe.dispatch.local import by_expert
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.ops.permute import Copies, combine, copies_of, permute
from megatron_moe.parallel.collectives import exchange, gather_for_partial, nothing, reduce_scatter


@dataclass(frozen=True)
class _WayHome:
    copies: Copies  # the rows sent, by expert
    weights: Tensor  # (rows sent,)
    send: list[int]  # rows to each rank of ep
    receive: list[int]  # rows from each rank of ep
    parts: list[int]  # rows that each rank of etp brings
    back: Copies  # from experts' order to that of arrival


class AllToAllDispatcher(Dispatcher):
    """Sends one row for each assignment straight to the rank that holds its expert. Experts stand in order over ep."""

    def dispatch(
        self, tokens: Tensor, plan: RoutingPlan, keys: Tensor | None = None, beside: Callable[[], None] = nothing
    ) -> ExpertBatch:
        order, counts = by_expert(plan)
        copies = copies_of(plan.token_ids[order], plan.num_tokens)
        weights = plan.combine_weights.index_select(0, order)
        rows = permute(tokens, copies)
        arriving = self._arriving(counts, tokens.device)  # (etp, ep, e)
        send = [sum(counts[r * self.local_experts : (r + 1) * self.local_experts]) for r in range(self.ep.size)]
        receive: list[int] = arriving[self.etp.rank].sum(dim=-1).tolist()
        rows = exchange(rows, self.ep, send, receive, beside)
        parts: list[int] = arriving.sum(dim=(1, 2)).tolist()
        rows = gather_for_partial(rows, self.etp, parts)
        # received as (etp, ep, expert) runs; experts want (expert, etp, ep)
        runs = torch.arange(self.local_experts).repeat(self.etp.size * self.ep.size)
        grouping = runs.repeat_interleave(arriving.reshape(-1)).argsort(stable=True).to(tokens.device)
        grouped = copies_of(grouping, rows.shape[0])
        # of a permutation: the inverse
        back = Copies(grouped.by_token, grouped.token_ids, grouped.starts)
        way = _WayHome(copies, weights, send, receive, parts, back)
        if keys is not None:
            keys = self.ep.comm.all_to_all(keys[copies.token_ids], send, receive)
            keys = self.etp.comm.all_gather(keys, parts)[grouping]
        return ExpertBatch(permute(rows, grouped), arriving.sum(dim=(0, 1)).tolist(), keys, way)

    def _arriving(self, counts: list[int], device: torch.device) -> Tensor:
        """(etp, ep, e) on the host: rows for each local expert from each rank of ep, for each rank of etp."""
        mine = torch.tensor(counts, dtype=torch.int64, device=device).view(self.ep.size, self.local_experts)
        ones = [1] * self.ep.size
        from_ep = self.ep.comm.all_to_all(mine, ones, ones)
        return self.etp.comm.all_gather(from_ep[None], [1] * self.etp.size).cpu()

    def combine(self, answers: Tensor, batch: ExpertBatch) -> Tensor:
        way: _WayHome = batch.way_home
        rows = permute(answers, way.back)
        rows = reduce_scatter(rows, self.etp, way.parts)
        rows = exchange(rows, self.ep, way.receive, way.send)
        return combine(rows, way.weights, way.copies)
