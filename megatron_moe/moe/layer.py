"""The whole sparse layer, in the order in which it is said: route, limit, dispatch, compute, combine."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.recompute import run_again
from megatron_moe.moe.capacity import Limit
from megatron_moe.moe.dispatch.all_gather import AllGatherDispatcher
from megatron_moe.moe.dispatch.all_to_all import AllToAllDispatcher
from megatron_moe.moe.dispatch.dispatcher import Dispatcher, NodeAxes
from megatron_moe.moe.dispatch.hierarchical import HierarchicalDispatcher
from megatron_moe.moe.dispatch.local import LocalDispatcher
from megatron_moe.moe.dispatch.one_per_rank import OnePerRankDispatcher
from megatron_moe.moe.experts import Draws, Experts
from megatron_moe.moe.plan import RoutingPlan, RoutingReport, TokenInfo
from megatron_moe.moe.rounds import in_rounds
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.shared_expert import SharedExpert
from megatron_moe.moe.sparse_layer import Routed, SparseLayer
from megatron_moe.moe.token_info import token_info
from megatron_moe.parallel.collectives import gather_from, nothing, split_to
from megatron_moe.parallel.state import Axis

DISPATCHERS: dict[str, type[Dispatcher]] = {
    "local": LocalDispatcher,
    "alltoall": AllToAllDispatcher,
    "allgather": AllGatherDispatcher,
    "one_per_rank": OnePerRankDispatcher,
    "hierarchical": HierarchicalDispatcher,
}


def build_dispatcher(
    kind: str, num_experts: int, ep: Axis, etp: Axis, preferred: str = "alltoall", nodes: NodeAxes | None = None
) -> Dispatcher:
    """kind: a name in DISPATCHERS, or "auto": local where all experts are whole on this rank, hierarchical over several
    nodes, else `preferred`.
    """
    if kind == "auto" and nodes is not None and nodes.between.size > 1:
        preferred = "hierarchical"
    if kind == "auto":
        kind = "local" if ep.size * etp.size == 1 else preferred
    return DISPATCHERS[kind](num_experts, ep, etp, nodes)


class _Once:
    """The shared expert's answer, computed when it is first asked for; None where there is no such expert."""

    def __init__(self, expert: SharedExpert | None, hidden: Tensor, ctx: ForwardContext) -> None:
        self._expert = expert
        self._hidden = hidden
        self._ctx = ctx
        self.answer: Tensor | None = None

    def run(self) -> None:
        if self._expert is not None and self.answer is None:
            self.answer = self._expert(self._hidden, self._ctx)


class MoELayer(SparseLayer):
    """Tokens of a routing group to experts and back, beside an optional shared expert."""

    def __init__(
        self,
        index: int,
        router: Router,
        limit: Limit,
        dispatcher: Dispatcher,
        experts: Experts,
        shared_expert: SharedExpert | None,
        tp: Axis,
        group_samples: int,
        rank_capacity: float | None = None,
        shared_beside: bool = True,
    ) -> None:
        """rank_capacity: rows that a rank may receive at once, in even parts of all; None: any number.   shared_beside:
        the shared expert runs while tokens travel, where they do so once."""
        super().__init__()
        self.index = index
        self.router = router
        self.limit = limit
        self.dispatcher = dispatcher
        self.experts = experts
        self.shared_expert = shared_expert
        self.tp = tp
        self.group_samples = group_samples
        self.rank_capacity = rank_capacity
        self.shared_beside = shared_beside

    @property
    def decider(self) -> Router:
        return self.router

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Routed:
        rows = hidden if ctx.sequence_parallel else split_to(hidden, self.tp)
        tokens = rows.flatten(0, 1)
        info = token_info(ctx, self.tp, self.index, self.group_samples)
        if self.router.reads_expert_keys:
            info = replace(info, expert_keys=self.experts.mean_keys().to(self.router.dtype))
        requested = self.router(tokens, info)
        plan = self.limit(requested, info)
        shared = _Once(self.shared_expert, hidden, ctx)
        out = self._by_experts(tokens, plan, info, ctx, shared.run if self.shared_beside else nothing).view(rows.shape)
        if not ctx.sequence_parallel:
            out = gather_from(out, self.tp, ctx.view.num_rows)
        shared.run()
        out = out if shared.answer is None else out + shared.answer
        return Routed(out, RoutingReport.of(self.index, requested, plan, info))

    def _by_experts(
        self, tokens: Tensor, plan: RoutingPlan, info: TokenInfo, ctx: ForwardContext, beside: Callable[[], None]
    ) -> Tensor:
        """(T, H) the weighted sum of the experts' answers to each token."""
        if self.rank_capacity is None:
            return self._round(tokens, plan, info, ctx, beside)
        rounds = in_rounds(plan, self.rank_capacity, self.dispatcher.ep, self.dispatcher.etp)
        if len(rounds) == 1:
            return self._round(tokens, plan, info, ctx, beside)
        # of a round nothing is kept, or all of them together would be as large as without rounds
        call = partial(run_again, self._round) if ctx.train else self._round
        found: list[Tensor] = [call(tokens, part, info, ctx) for part in rounds]
        return torch.stack(found).sum(dim=0)

    def _round(
        self,
        tokens: Tensor,
        plan: RoutingPlan,
        info: TokenInfo,
        ctx: ForwardContext,
        beside: Callable[[], None] = nothing,
    ) -> Tensor:
        """To the experts and back."""
        drops = info.train and self.experts.dropout is not None
        batch = self.dispatcher.dispatch(tokens, plan, info.global_keys if drops else None, beside)
        draws = None if batch.keys is None else Draws(batch.keys, info.random)
        answers = self.experts(batch.rows, batch.tokens_per_expert, ctx.weight_gradients, draws)
        return self.dispatcher.combine(answers, batch)

    def before_step(self, progress: float) -> None:
        self.router.before_step(progress)

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        self.router.after_step(own, model)
