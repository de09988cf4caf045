"""Permute, exchange over ep, gather over etp, group by expert; and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import Dispatcher, ExpertBatch
from megatron_moe.moe.dispatch.local import by_expert
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.ops.permute import combine, permute, unpermute
from megatron_moe.parallel.collectives import exchange, gather_for_partial, reduce_scatter


@dataclass(frozen=True)
class _WayHome:
    plan: RoutingPlan
    order: Tensor  # (rows sent,) assignments by expert
    send: list[int]  # rows to each rank of ep
    receive: list[int]  # rows from each rank of ep
    parts: list[int]  # rows that each rank of etp brings
    grouping: Tensor  # (R,) received rows by expert


class AllToAllDispatcher(Dispatcher):
    """Sends one row for each assignment straight to the rank that holds its expert. Experts stand in order over ep."""

    def dispatch(self, tokens: Tensor, plan: RoutingPlan) -> ExpertBatch:
        order, counts = by_expert(plan)
        rows = permute(tokens, plan.token_ids, order, plan.choices)
        arriving = self._arriving(counts, tokens.device)  # (etp, ep, e)
        send = [sum(counts[r * self.local_experts : (r + 1) * self.local_experts]) for r in range(self.ep.size)]
        receive: list[int] = arriving[self.etp.rank].sum(dim=-1).tolist()
        rows = exchange(rows, self.ep, send, receive)
        parts: list[int] = arriving.sum(dim=(1, 2)).tolist()
        rows = gather_for_partial(rows, self.etp, parts)
        # received as (etp, ep, expert) runs; experts want (expert, etp, ep)
        runs = torch.arange(self.local_experts).repeat(self.etp.size * self.ep.size)
        grouping = runs.repeat_interleave(arriving.reshape(-1)).argsort(stable=True).to(tokens.device)
        everyone = torch.arange(rows.shape[0], device=tokens.device)
        rows = permute(rows, everyone, grouping, 1)
        return ExpertBatch(
            rows, arriving.sum(dim=(0, 1)).tolist(), _WayHome(plan, order, send, receive, parts, grouping)
        )

    def _arriving(self, counts: list[int], device: torch.device) -> Tensor:
        """(etp, ep, e) on the host: rows for each local expert from each rank of ep, for each rank of etp."""
        mine = torch.tensor(counts, dtype=torch.int64, device=device).view(self.ep.size, self.local_experts)
        ones = [1] * self.ep.size
        from_ep = self.ep.comm.all_to_all(mine, ones, ones)
        return self.etp.comm.all_gather(from_ep[None], [1] * self.etp.size).cpu()

    def combine(self, answers: Tensor, batch: ExpertBatch) -> Tensor:
        way: _WayHome = batch.way_home
        plan = way.plan
        rows = unpermute(answers, way.grouping, way.grouping.shape[0])
        rows = reduce_scatter(rows, self.etp, way.parts)
        rows = exchange(rows, self.ep, way.receive, way.send)
        home = unpermute(rows, way.order, plan.token_ids.shape[0])
        return combine(home, plan.combine_weights, plan.token_ids, plan.num_tokens, plan.choices)
