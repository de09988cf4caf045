"""A block that works for the best tokens of each sequence only.  [Mixture-of-Depths, arXiv:2404.02258]"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.models.transformer import LayerSpec, TransformerLayer, router_site
from megatron_moe.moe.methods import build_router, find_method
from megatron_moe.moe.plan import RoutingReport
from megatron_moe.moe.routers.mixture_of_depths import MixtureOfDepthsRouter
from megatron_moe.moe.sparse_layer import Routed, SparseLayer
from megatron_moe.moe.token_info import token_info
from megatron_moe.parallel.collectives import gather_for_partial, gather_from, gather_rows, own_rows, shares, split_to
from megatron_moe.parallel.state import ParallelState


@dataclass(frozen=True)
class _Chosen:
    """Which sequence rows the block sees, the same on all ranks of tp."""

    rows: Tensor  # (C, B) int64, ascending
    valid: Tensor  # (C, B) bool: False fills a sequence that has fewer


class DepthLayer(SparseLayer):
    """x + r · f(x) for chosen tokens, x for the others; f is what attention and feed-forward add."""

    def __init__(self, spec: LayerSpec, moe: MoEConfig, state: ParallelState) -> None:
        super().__init__()
        router = build_router(moe, spec.attention.hidden_size, router_site(spec, state))
        assert isinstance(router, MixtureOfDepthsRouter)
        self.index = spec.index
        self.router = router
        self.block = TransformerLayer(replace(spec, moe=None), state)
        self.tp = state.tp
        self.group_samples = moe.routing_group_samples

    @property
    def decider(self) -> nn.Module:
        return self.router

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Routed:
        if ctx.cache is not None:
            raise ConfigError(
                "mixture_of_depths chooses other tokens of each sample as keys, which the key-value cache of decoding "
                "cannot leave out; evaluate whole sequences instead."
            )
        rows = hidden if ctx.sequence_parallel else split_to(hidden, self.tp)
        info = token_info(ctx, self.tp, self.index, self.group_samples)
        plan = self.router(rows.flatten(0, 1), info)
        taken = (plan.expert_ids == 0).view(rows.shape[:2])
        weights = plan.combine_weights.view(*rows.shape[:2], 1)
        chosen = self._choose(taken, ctx)
        added = self._added(hidden, chosen, ctx)
        if not ctx.sequence_parallel:
            weights = gather_from(weights, self.tp, ctx.view.num_rows)
        out = hidden + (weights * added.to(weights.dtype)).to(hidden.dtype)
        return Routed(out, RoutingReport.of(self.index, plan, plan, info))

    def _choose(self, taken: Tensor, ctx: ForwardContext) -> _Chosen:
        """taken: (S/tp, B) bool."""
        length = ctx.view.num_rows
        flags = gather_rows(taken.to(torch.int64), self.tp, length)
        count = length if self.router.takes_all_rows(ctx.train) else self.router.places(length)
        # stable: the chosen come first, each kind in the order of the sequence
        rows = flags.sort(dim=0, descending=True, stable=True).indices[:count]
        return _Chosen(rows, flags.gather(0, rows) > 0)

    def _added(self, hidden: Tensor, chosen: _Chosen, ctx: ForwardContext) -> Tensor:
        """f of the chosen tokens at their places, zero elsewhere; rows as in hidden."""
        length, count = ctx.view.num_rows, len(chosen.rows)
        whole = hidden
        if ctx.sequence_parallel:
            whole = gather_for_partial(hidden, self.tp, shares(length, self.tp.size))
        index = chosen.rows[..., None].expand(-1, -1, hidden.shape[2])
        picked = whole.gather(0, index)
        if ctx.sequence_parallel:
            picked = own_rows(picked, self.tp)
        inner = replace(ctx, view=_view_of(chosen, ctx))
        attended = self.block.attention(self.block.attention_norm(picked), inner)
        added = attended + self.block.mlp(self.block.mlp_norm(picked + attended), inner)
        if ctx.sequence_parallel:
            added = gather_for_partial(added, self.tp, shares(count, self.tp.size))
        added = added * chosen.valid[..., None]
        spread = torch.zeros_like(whole).scatter(0, index, added)
        return own_rows(spread, self.tp) if ctx.sequence_parallel else spread

    def before_step(self, progress: float) -> None:
        self.router.before_step(progress)

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        self.router.after_step(own, model)


class DepthBlock(nn.Module):
    """A DepthLayer in a Transformer layer's place."""

    def __init__(self, spec: LayerSpec, moe: MoEConfig, state: ParallelState) -> None:
        super().__init__()
        self.depth = DepthLayer(spec, moe, state)

    @property
    def sparse(self) -> SparseLayer:
        return self.depth

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> tuple[Tensor, RoutingReport]:
        routed = self.depth(hidden, ctx)
        return routed.hidden, routed.report


def build_block(spec: LayerSpec, state: ParallelState) -> TransformerLayer | DepthBlock:
    """The block of a spec: a Transformer layer, or one that only some tokens pass through."""
    method = None if spec.moe is None else find_method(spec.moe.router_type)
    if spec.moe is not None and getattr(method, "wraps_block", False):
        return DepthBlock(spec, spec.moe, state)
    return TransformerLayer(spec, state)


def _view_of(chosen: _Chosen, ctx: ForwardContext) -> SequenceView:
    """The chosen tokens as a sequence of their own; they keep their positions."""
    view = ctx.view
    segments = view.segments.gather(0, chosen.rows).masked_fill(~chosen.valid, -1)
    return replace(
        view,
        tokens=view.tokens.gather(0, chosen.rows),
        positions=view.positions.gather(0, chosen.rows),
        segments=segments,
        rows=torch.arange(len(chosen.rows), device=chosen.rows.device),
        segmented=True,
    )
