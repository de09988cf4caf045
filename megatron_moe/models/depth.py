"""A block that works for the best tokens of each sequence only.  [Mixture-of-Depths, arXiv:2404.02258]"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.layers.context import ForwardContext, SequenceView
from megatron_moe.models.transformer import LayerSpec, TransformerLayer, router_site
from megatron_moe.moe.methods import build_router, find_method
from megatron_moe.moe.plan import RoutingReport
from megatron_moe.moe.routers.mixture_of_depths import UNDECODABLE, MixtureOfDepthsRouter
from megatron_moe.moe.sparse_layer import Routed, SparseLayer
from megatron_moe.moe.token_info import token_info
from megatron_moe.parallel.collectives import gather_for_partial, gather_from, gather_rows, own_rows, shares, split_to
from megatron_moe.parallel.state import ParallelState


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
        """Raises ConfigError when tokens are decoded and the rule compares with later ones."""
        everyone = self.router.takes_all_rows(ctx.train)
        if ctx.cache is not None and not everyone:
            raise ConfigError(UNDECODABLE)
        rows = hidden if ctx.sequence_parallel else split_to(hidden, self.tp)
        info = token_info(ctx, self.tp, self.index, self.group_samples)
        plan = self.router(rows.flatten(0, 1), info)
        taken = (plan.expert_ids == 0).view(rows.shape[:2])
        weights = plan.combine_weights.view(*rows.shape[:2], 1)
        # what the block sees is decided on all ranks of tp alike
        taken = gather_rows(taken.to(torch.int64), self.tp, ctx.view.num_rows)
        update = self._update_among_all if everyone else self._update_of_chosen
        out = hidden + update(hidden, weights, taken, ctx)
        return Routed(out, RoutingReport.of(self.index, plan, plan, info))

    def _update_of_chosen(self, hidden: Tensor, weights: Tensor, taken: Tensor, ctx: ForwardContext) -> Tensor:
        """r · f of the chosen tokens at their places, zero elsewhere; the block sees C rows.

        hidden: (S/tp, B, H) under sequence parallelism, else (S, B, H), and so the answer.   weights: (S/tp, B, 1)
        wide, zero for tokens that were not chosen.   taken: (S, B) int64, 1 for chosen ones.
        """
        length = ctx.view.num_rows
        # stable: the chosen come first, in the order of the sequence; a sequence with fewer has padding behind them
        chosen = taken.sort(dim=0, descending=True, stable=True).indices[: self.router.places(length)]
        index = chosen[..., None].expand(-1, -1, hidden.shape[2])
        weights = gather_from(weights, self.tp, length).gather(0, chosen[..., None])
        inner = replace(ctx, view=_chosen_view(chosen, ctx.view), bias=_chosen_bias(chosen, ctx.bias))
        if not ctx.sequence_parallel:
            update = _scaled(weights, self._added(hidden.gather(0, index), inner))
            return torch.zeros_like(hidden).scatter(0, index, update)
        whole = gather_from(hidden, self.tp, length)
        added = self._added(split_to(whole.gather(0, index), self.tp), inner)
        update = _scaled(split_to(weights, self.tp), added)
        # each rank goes on with other rows of it
        update = gather_for_partial(update, self.tp, shares(len(chosen), self.tp.size))
        return own_rows(torch.zeros_like(whole).scatter(0, index, update), self.tp)

    def _update_among_all(self, hidden: Tensor, weights: Tensor, taken: Tensor, ctx: ForwardContext) -> Tensor:
        """The same where nobody knows beforehand how many are chosen: the block sees all rows, chosen ones are keys.

        Shapes as above.  The others' answers cost as much, and weigh nothing.
        """
        if ctx.cache is not None:
            taken = ctx.cache.append_kept(self.index, taken > 0)
        added = self._added(hidden, replace(ctx, view=_masked_view(taken > 0, ctx.view)))
        if not ctx.sequence_parallel:
            weights = gather_from(weights, self.tp, ctx.view.num_rows)
        return _scaled(weights, added)

    def _added(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """f: what the block adds to its input, without the rounding of a subtraction."""
        added: Tensor = self.block.attention(self.block.attention_norm(hidden), ctx)
        if self.block.looks_across:
            added = added + self.block.cross_attention(self.block.cross_norm(hidden + added), ctx)
        added = added + self.block.mlp(self.block.mlp_norm(hidden + added), ctx)
        return added

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


def _scaled(weights: Tensor, added: Tensor) -> Tensor:
    """The product is wide, the answer in the model's dtype."""
    return (weights * added.to(weights.dtype)).to(added.dtype)


def _chosen_view(rows: Tensor, view: SequenceView) -> SequenceView:
    """The tokens in these rows (C, B) as a sequence of their own; they keep their positions."""
    return replace(
        view,
        tokens=view.tokens.gather(0, rows),
        positions=view.positions.gather(0, rows),
        segments=view.segments.gather(0, rows),
        rows=torch.arange(len(rows), device=rows.device),
        prefix=None if view.prefix is None else view.prefix.gather(0, rows),
    )


def _chosen_bias(rows: Tensor, bias: Tensor | None) -> Tensor | None:
    """(B, heads, C, C): the bias (1, heads, S, S) between the tokens in these rows (C, B)."""
    if bias is None:
        return None
    places = rows.t()
    return bias[0][:, places[:, :, None], places[:, None, :]].transpose(0, 1)


def _masked_view(taken: Tensor, view: SequenceView) -> SequenceView:
    """All tokens so far, those that were not taken as padding; the rows of this pass stand at the end.

    taken: (past + S, B) bool; what else a view tells of the past S positions is not read.
    """
    past = len(taken) - view.length

    def after_the_past(values: Tensor) -> Tensor:
        return nn.functional.pad(values, (0, 0, past, 0))

    return replace(
        view,
        tokens=after_the_past(view.tokens),
        positions=after_the_past(view.positions),
        segments=after_the_past(view.segments).masked_fill(~taken, -1),
        rows=view.rows + past,
        segmented=True,
        start=0,
        prefix=None if view.prefix is None else after_the_past(view.prefix),
    )
