"""A token travels once to each rank that holds any of its experts; its answers are summed there before the way back.

What SAM (arXiv:2110.07431) and small memory blocks want: the bytes on the wire do not grow with k inside a rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import Dispatcher, ExpertBatch
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.ops.permute import permute
from megatron_moe.parallel.collectives import exchange, gather_counts, gather_for_partial, reduce_scatter


@dataclass(frozen=True)
class _Visits:
    """Which token goes to which rank of ep, once each."""

    token_ids: Tensor  # (V,) by rank, then token
    send: list[int]  # visits to each rank
    assignments: Tensor  # (A,) plan's assignments by rank; nobody's left out
    visit_of: Tensor  # (A,) each assignment's visit, counted within its rank
    send_assignments: list[int]


@dataclass(frozen=True)
class _WayHome:
    num_tokens: int
    visits: _Visits
    receive: list[int]
    parts: list[int]  # rows of each rank of etp
    row_ids: Tensor  # (R,) received row of each assignment, by expert
    weights: Tensor  # (R,)


class OnePerRankDispatcher(Dispatcher):
    """Sends one row for each (token, rank) pair, with the (expert, weight) pairs beside it."""

    def dispatch(self, tokens: Tensor, plan: RoutingPlan) -> ExpertBatch:
        visits = self._visits(plan)
        rows, receive, parts = self._send_rows(tokens, visits)
        who, weights = self._send_assignments(plan, visits, receive, parts)
        counts: list[int] = who[:, 1].bincount(minlength=self.local_experts).tolist()
        order = who[:, 1].argsort(stable=True)
        row_ids = who[:, 0][order]
        way = _WayHome(plan.num_tokens, visits, receive, parts, row_ids, weights[order])
        return ExpertBatch(permute(rows, who[:, 0], order, 0), counts, way)

    def _visits(self, plan: RoutingPlan) -> _Visits:
        real = (plan.expert_ids < self.num_experts).nonzero().squeeze(1)
        ranks = plan.expert_ids[real] // self.local_experts
        order = ranks.argsort(stable=True)
        assignments, ranks = real[order], ranks[order]
        pairs = ranks * plan.num_tokens + plan.token_ids[assignments]
        unique, visit = pairs.unique(return_inverse=True)  # sorted: by rank, then token
        send = (unique // max(1, plan.num_tokens)).bincount(minlength=self.ep.size)
        first = send.cumsum(0) - send
        return _Visits(
            token_ids=unique % max(1, plan.num_tokens),
            send=send.tolist(),
            assignments=assignments,
            visit_of=visit - first[ranks],
            send_assignments=ranks.bincount(minlength=self.ep.size).tolist(),
        )

    def _send_rows(self, tokens: Tensor, visits: _Visits) -> tuple[Tensor, list[int], list[int]]:
        receive = self._swap_counts(visits.send, tokens.device)
        everyone = torch.arange(len(visits.token_ids), device=tokens.device)
        rows = exchange(permute(tokens, visits.token_ids, everyone, 0), self.ep, visits.send, receive)
        parts = gather_counts(rows.shape[0], self.etp, tokens.device)
        return gather_for_partial(rows, self.etp, parts), receive, parts

    def _send_assignments(
        self, plan: RoutingPlan, visits: _Visits, receive: list[int], parts: list[int]
    ) -> tuple[Tensor, Tensor]:
        """(A', 2) received (row, local expert) and (A',) weights, of all ranks of etp."""
        device = plan.expert_ids.device
        arriving = self._swap_counts(visits.send_assignments, device)
        experts = plan.expert_ids[visits.assignments] % self.local_experts
        who = self.ep.comm.all_to_all(torch.stack([visits.visit_of, experts], dim=1), visits.send_assignments, arriving)
        weights = exchange(plan.combine_weights[visits.assignments], self.ep, visits.send_assignments, arriving)
        # visits were counted within one sender: move them behind the rows of the senders before
        starts = torch.tensor([sum(receive[:r]) for r in range(self.ep.size)], device=device)
        offset = starts.repeat_interleave(torch.tensor(arriving, device=device)) + sum(parts[: self.etp.rank])
        who = torch.stack([who[:, 0] + offset, who[:, 1]], dim=1)
        counts = gather_counts(who.shape[0], self.etp, device)
        return self.etp.comm.all_gather(who, counts), gather_for_partial(weights, self.etp, counts)

    def _swap_counts(self, counts: list[int], device: torch.device) -> list[int]:
        ones = [1] * self.ep.size
        swapped: list[int] = self.ep.comm.all_to_all(torch.tensor(counts, device=device), ones, ones).tolist()
        return swapped

    def combine(self, answers: Tensor, batch: ExpertBatch) -> Tensor:
        way: _WayHome = batch.way_home
        weighted = answers.to(way.weights.dtype) * way.weights[:, None]
        rows = weighted.new_zeros((sum(way.parts), answers.shape[1])).index_add(0, way.row_ids, weighted)
        rows = reduce_scatter(rows, self.etp, way.parts).to(answers.dtype)
        home = exchange(rows, self.ep, way.receive, way.visits.send)
        total = home.new_zeros((way.num_tokens, answers.shape[1]), dtype=way.weights.dtype)
        return total.index_add(0, way.visits.token_ids, home.to(way.weights.dtype)).to(answers.dtype)
