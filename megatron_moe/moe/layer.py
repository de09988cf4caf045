"""The whole sparse layer, in the order in which it is said: route, limit, dispatch, compute, combine."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.capacity import Limit
from megatron_moe.moe.dispatch.all_gather import AllGatherDispatcher
from megatron_moe.moe.dispatch.all_to_all import AllToAllDispatcher
from megatron_moe.moe.dispatch.dispatcher import Dispatcher
from megatron_moe.moe.dispatch.local import LocalDispatcher
from megatron_moe.moe.dispatch.one_per_rank import OnePerRankDispatcher
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.plan import RoutingReport, TokenInfo
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.shared_expert import SharedExpert
from megatron_moe.parallel.collectives import gather_from, own_rows, split_to
from megatron_moe.parallel.state import Axis

DISPATCHERS: dict[str, type[Dispatcher]] = {
    "local": LocalDispatcher,
    "alltoall": AllToAllDispatcher,
    "allgather": AllGatherDispatcher,
    "one_per_rank": OnePerRankDispatcher,
}


@dataclass(frozen=True)
class Routed:
    """What an MoE layer returns."""

    hidden: Tensor
    report: RoutingReport


def build_dispatcher(kind: str, num_experts: int, ep: Axis, etp: Axis) -> Dispatcher:
    """kind: a name in DISPATCHERS, or "auto": local where all experts are whole on this rank, else alltoall."""
    if kind == "auto":
        kind = "local" if ep.size * etp.size == 1 else "alltoall"
    return DISPATCHERS[kind](num_experts, ep, etp)


def token_info(ctx: ForwardContext, tp: Axis, layer: int, group_samples: int) -> TokenInfo:
    """What routers may know of the tokens of this rank: rows split over tp, position-major."""
    view = ctx.view
    rows = own_rows(view.rows, tp)
    samples = view.num_samples
    num_groups = -(-samples // group_samples)
    sample = torch.arange(samples, device=rows.device).expand(len(rows), samples)
    position = (rows + view.start)[:, None].expand_as(sample)
    padding = view.segments < 0
    per_sample = (~padding).sum(dim=0)
    group_of = torch.arange(samples, device=rows.device) // group_samples
    group_tokens = torch.zeros(num_groups, dtype=torch.int64, device=rows.device).index_add_(0, group_of, per_sample)
    return TokenInfo(
        ids=view.tokens[rows].flatten(),
        positions=position.flatten(),
        sequences=sample.flatten(),
        is_padding=padding[rows].flatten(),
        groups=(sample // group_samples).flatten(),
        keys=(position * group_samples + sample % group_samples).flatten(),
        # 2^32 positions in a sequence are room enough
        global_keys=((view.sample_ids << 32) + position).flatten(),
        num_groups=num_groups,
        group_size=view.length * group_samples,
        group_tokens=group_tokens,
        random=ctx.random.at(stream="router", layer=layer),
        train=ctx.train,
    )


class MoELayer(nn.Module):
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
    ) -> None:
        super().__init__()
        self.index = index
        self.router = router
        self.limit = limit
        self.dispatcher = dispatcher
        self.experts = experts
        self.shared_expert = shared_expert
        self.tp = tp
        self.group_samples = group_samples

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Routed:
        """(S/(cp·tp), B, H) under sequence parallelism, else (S/cp, B, H); the same shape back."""
        rows = hidden if ctx.sequence_parallel else split_to(hidden, self.tp)
        tokens = rows.flatten(0, 1)
        info = token_info(ctx, self.tp, self.index, self.group_samples)
        requested = self.router(tokens, info)
        plan = self.limit(requested, info)
        batch = self.dispatcher.dispatch(tokens, plan)
        answers = self.experts(batch.rows, batch.tokens_per_expert, ctx.weight_gradients)
        out = self.dispatcher.combine(answers, batch).view(rows.shape)
        if not ctx.sequence_parallel:
            out = gather_from(out, self.tp, ctx.view.num_rows)
        if self.shared_expert is not None:
            out = out + self.shared_expert(hidden, ctx)
        return Routed(out, RoutingReport.of(self.index, requested, plan, info))
