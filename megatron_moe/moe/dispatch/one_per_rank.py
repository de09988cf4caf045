"""A token travels once to each rank that holds any of its experts; its answers are summed there before the way back.

What SAM (arXiv:2110.07431) and small memory blocks want: the bytes on the wire do not grow with k inside a rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import Dispatcher, ExpertBatch
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.ops.permute import Copies, combine, copies_of, permute
from megatron_moe.parallel.collectives import exchange, gather_counts, gather_for_partial, nothing, reduce_scatter


@dataclass(frozen=True)
class _Visits:
    """Which token goes to which rank of ep, once each."""

    copies: Copies  # the visits (V,) by rank, then token
    send: list[int]  # visits to each rank
    assignments: Tensor  # (A,) plan's assignments by rank; nobody's left out
    visit_of: Tensor  # (A,) each assignment's visit, counted within its rank
    send_assignments: list[int]


@dataclass(frozen=True)
class _WayHome:
    visits: _Visits
    receive: list[int]
    parts: list[int]  # rows of each rank of etp
    copies: Copies  # the assignments by expert, of the rows received
    weights: Tensor  # (R,)


class OnePerRankDispatcher(Dispatcher):
    """Sends one row for each (token, rank) pair, with the (expert, weight) pairs beside it."""

    def dispatch(
        self, tokens: Tensor, plan: RoutingPlan, keys: Tensor | None = None, beside: Callable[[], None] = nothing
    ) -> ExpertBatch:
        visits = self._visits(plan)
        rows, receive, parts = self._send_rows(tokens, visits, beside)
        who, weights = self._send_assignments(plan, visits, receive, parts)
        counts: list[int] = who[:, 1].bincount(minlength=self.local_experts).tolist()
        order = who[:, 1].argsort(stable=True)
        copies = copies_of(who[:, 0][order], rows.shape[0])
        way = _WayHome(visits, receive, parts, copies, weights.index_select(0, order))
        if keys is not None:
            keys = self.ep.comm.all_to_all(keys[visits.copies.token_ids], visits.send, receive)
            keys = self.etp.comm.all_gather(keys, parts)[copies.token_ids]
        return ExpertBatch(permute(rows, copies), counts, keys, way)

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
            copies=copies_of(unique % max(1, plan.num_tokens), plan.num_tokens),
            send=send.tolist(),
            assignments=assignments,
            visit_of=visit - first[ranks],
            send_assignments=ranks.bincount(minlength=self.ep.size).tolist(),
        )

    def _send_rows(
        self, tokens: Tensor, visits: _Visits, beside: Callable[[], None]
    ) -> tuple[Tensor, list[int], list[int]]:
        receive = self._swap_counts(visits.send, tokens.device)
        rows = exchange(permute(tokens, visits.copies), self.ep, visits.send, receive, beside)
        parts = gather_counts(rows.shape[0], self.etp, tokens.device)
        return gather_for_partial(rows, self.etp, parts), receive, parts

    def _send_assignments(
        self, plan: RoutingPlan, visits: _Visits, receive: list[int], parts: list[int]
    ) -> tuple[Tensor, Tensor]:
        """(A', 2) received (row, local expert) and (A',) weights, of all ranks of etp."""
        device = plan.expert_ids.device
        arriving = self._swap_counts(visits.send_assignments, device)
        experts = plan.expert_ids[visits.assignments] % self.local_experts
        # visit and expert in one number: with many small experts these pairs weigh as much as the rows
        pairs = visits.visit_of * self.local_experts + experts
        pairs = self.ep.comm.all_to_all(pairs, visits.send_assignments, arriving)
        weights = exchange(plan.combine_weights[visits.assignments], self.ep, visits.send_assignments, arriving)
        # visits were counted within one sender: move them behind the rows of the senders before
        starts = torch.tensor([sum(receive[:r]) for r in range(self.ep.size)], device=device)
        offset = starts.repeat_interleave(torch.tensor(arriving, device=device)) + sum(parts[: self.etp.rank])
        who = torch.stack([pairs // self.local_experts + offset, pairs % self.local_experts], dim=1)
        counts = gather_counts(who.shape[0], self.etp, device)
        return self.etp.comm.all_gather(who, counts), gather_for_partial(weights, self.etp, counts)

    def _swap_counts(self, counts: list[int], device: torch.device) -> list[int]:
        ones = [1] * self.ep.size
        swapped: list[int] = self.ep.comm.all_to_all(torch.tensor(counts, device=device), ones, ones).tolist()
        return swapped

    def combine(self, answers: Tensor, batch: ExpertBatch) -> Tensor:
        way: _WayHome = batch.way_home
        rows = combine(answers.to(way.weights.dtype), way.weights, way.copies)
        rows = reduce_scatter(rows, self.etp, way.parts).to(answers.dtype)
        home = exchange(rows, self.ep, way.receive, way.visits.send)
        return combine(home, way.weights.new_ones(home.shape[0]), way.visits.copies)
