"""Every rank sees every token and serves those of its own experts: simple, good for few ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import Dispatcher, ExpertBatch
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.ops.permute import Copies, combine, copies_of, permute
from megatron_moe.parallel.collectives import gather_counts, gather_for_partial, nothing, reduce_scatter


@dataclass(frozen=True)
class _WayHome:
    copies: Copies  # the rows by expert, of all ranks' tokens
    weights: Tensor  # (R,)
    etp_rows: list[int]
    ep_rows: list[int]


class AllGatherDispatcher(Dispatcher):
    """Gathers tokens and assignments over etp and ep, keeps the local experts', sums answers on the way back."""

    def dispatch(
        self, tokens: Tensor, plan: RoutingPlan, keys: Tensor | None = None, beside: Callable[[], None] = nothing
    ) -> ExpertBatch:
        beside()
        device = tokens.device
        etp_rows = gather_counts(tokens.shape[0], self.etp, device)
        ep_rows = gather_counts(sum(etp_rows), self.ep, device)
        everyone = gather_for_partial(gather_for_partial(tokens, self.etp, etp_rows), self.ep, ep_rows)
        etp_plans = gather_counts(plan.expert_ids.shape[0], self.etp, device)
        ep_plans = gather_counts(sum(etp_plans), self.ep, device)
        # where this rank's tokens stand among all
        start = sum(ep_rows[: self.ep.rank]) + sum(etp_rows[: self.etp.rank])
        who = torch.stack([plan.token_ids + start, plan.expert_ids], dim=1)
        who = self.ep.comm.all_gather(self.etp.comm.all_gather(who, etp_plans), ep_plans)
        weights = gather_for_partial(gather_for_partial(plan.combine_weights, self.etp, etp_plans), self.ep, ep_plans)
        first = self.ep.rank * self.local_experts
        local = who[:, 1] - first
        local = local.where((local >= 0) & (local < self.local_experts), self.local_experts)
        counts: list[int] = local.bincount(minlength=self.local_experts + 1)[: self.local_experts].tolist()
        order = local.argsort(stable=True)[: sum(counts)]
        copies = copies_of(who[:, 0][order], everyone.shape[0])
        way = _WayHome(copies, weights.index_select(0, order), etp_rows, ep_rows)
        if keys is not None:
            keys = self.ep.comm.all_gather(self.etp.comm.all_gather(keys, etp_rows), ep_rows)[copies.token_ids]
        return ExpertBatch(permute(everyone, copies), counts, keys, way)

    def combine(self, answers: Tensor, batch: ExpertBatch) -> Tensor:
        way: _WayHome = batch.way_home
        total = combine(answers.to(way.weights.dtype), way.weights, way.copies)
        mine = reduce_scatter(reduce_scatter(total, self.ep, way.ep_rows), self.etp, way.etp_rows)
        return mine.to(answers.dtype)
