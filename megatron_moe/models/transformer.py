"""One Transformer layer, built from its own spec, and a run of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.config.moe import MoEConfig
from megatron_moe.layers.attention import Attention, AttentionShape
from megatron_moe.layers.attention_core import RecomputedAttention
from megatron_moe.layers.attention_cores import build_core
from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.cross_attention import CrossAttention
from megatron_moe.layers.mlp import MLP
from megatron_moe.layers.norm import Norm
from megatron_moe.layers.recompute import remade, run_again
from megatron_moe.moe.capacity import make_limit
from megatron_moe.moe.dispatch.dispatcher import NodeAxes
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.layer import MoELayer, build_dispatcher
from megatron_moe.moe.methods import build_router, build_unrouted, find_method
from megatron_moe.moe.plan import RoutingReport
from megatron_moe.moe.routers.router import Router, Site
from megatron_moe.moe.shared_expert import SharedExpert
from megatron_moe.moe.sparse_layer import SparseLayer
from megatron_moe.moe.unrouted.unrouted_layer import LayerSite
from megatron_moe.parallel.state import ParallelState


@dataclass(frozen=True)
class LayerSpec:
    """All that one layer is made from; two layers of a model may differ in any of it."""

    index: int  # in the whole model
    attention: AttentionShape
    normalization: str
    ffn_size: int
    activation: str
    moe: MoEConfig | None  # None: a dense feed-forward layer
    dtype: torch.dtype
    sequence_parallel: bool
    stream: str = "decoder"  # whose tokens pass through it
    cross_attention: bool = False  # whether it looks at the encoder's output
    vocab_size: int = 0  # ids that mean something
    seed: int = 0
    cp_comm_type: str = "all_gather"  # how attention goes over the ranks of a sequence
    recompute_modules: frozenset[str] = frozenset()  # run again in the backward pass
    rank_capacity: float | None = None  # rows that a rank of experts receives at once, in even parts

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


def build_sparse(spec: LayerSpec, moe: MoEConfig, state: ParallelState) -> SparseLayer:
    """The sparse feed-forward layer of a spec."""
    if issubclass(find_method(moe.router_type), Router):
        return build_moe(spec, moe, state)
    shape = spec.attention
    site = LayerSite(
        index=spec.index,
        hidden_size=shape.hidden_size,
        ffn_size=moe.expert_ffn_size(spec.ffn_size),
        activation=moe.activation or spec.activation,
        init_std=shape.init_std,
        output_std=shape.output_std,
        dtype=spec.dtype,
        state=state,
    )
    return build_unrouted(moe, site)


def router_site(spec: LayerSpec, state: ParallelState) -> Site:
    """Where the router of a spec's layer stands."""
    return Site(state.tp_cp, spec.wide, spec.attention.init_std, spec.index, spec.vocab_size, spec.seed)


def build_moe(spec: LayerSpec, moe: MoEConfig, state: ParallelState) -> MoELayer:
    """Router, limit, dispatcher, experts."""
    shape = spec.attention
    router = build_router(moe, shape.hidden_size, router_site(spec, state))
    experts = Experts(
        moe.num_experts,
        shape.hidden_size,
        moe.expert_ffn_size(spec.ffn_size),
        moe.activation or spec.activation,
        state.ep,
        state.etp,
        init_std=shape.init_std,
        output_std=shape.output_std,
        dtype=spec.dtype,
        bias=moe.expert_bias,
        dropout=moe.expert_dropout,
        recompute_activation="moe_act" in spec.recompute_modules,
    )
    nodes = NodeAxes(state.ep_node, state.ep_local)
    dispatcher = build_dispatcher(
        moe.token_dispatcher_type, moe.num_experts, state.ep, state.etp, preferred=router.dispatcher, nodes=nodes
    )
    limit = make_limit(moe, router.choices(moe), state.tp_cp, router.expert_pools)
    shared = _shared_expert(spec, moe, state)
    return MoELayer(
        spec.index,
        router,
        limit,
        dispatcher,
        experts,
        shared,
        state.tp,
        moe.routing_group_samples,
        spec.rank_capacity,
        moe.shared_expert_overlap,
    )


def _shared_expert(spec: LayerSpec, moe: MoEConfig, state: ParallelState) -> SharedExpert | None:
    if not moe.shared_expert_intermediate_size:
        return None
    return SharedExpert(
        spec.attention.hidden_size,
        moe.shared_expert_intermediate_size,
        spec.activation,
        state.tp,
        gated=moe.shared_expert_gate,
        partial=spec.sequence_parallel,
        init_std=spec.attention.init_std,
        output_std=spec.attention.output_std,
        dtype=spec.dtype,
    )


def build_mlp(spec: LayerSpec, state: ParallelState) -> MLP:
    """The dense feed-forward layer of a spec."""
    shape = spec.attention
    return MLP(
        shape.hidden_size,
        spec.ffn_size,
        spec.activation,
        state.tp,
        init_std=shape.init_std,
        output_std=shape.output_std,
        dtype=spec.dtype,
    )


def _norm(spec: LayerSpec) -> Norm:
    shape = spec.attention
    partial = spec.sequence_parallel
    return Norm(shape.hidden_size, spec.normalization, shape.norm_epsilon, partial=partial, dtype=spec.dtype)


class ExtraFFN(nn.Module):
    """A dense feed-forward sub-layer beside a sparse one, with its own norm.  [ST-MoE, arXiv:2202.08906, appendix C]"""

    def __init__(self, spec: LayerSpec, state: ParallelState) -> None:
        super().__init__()
        self.norm = _norm(spec)
        self.mlp = build_mlp(spec, state)

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """The residual is inside."""
        added: Tensor = self.mlp(self.norm(hidden), ctx)
        return hidden + added


class TransformerLayer(nn.Module):
    """norm, attention, residual, norm, MLP or MoE, residual; cross-attention between them where the spec has it."""

    def __init__(self, spec: LayerSpec, state: ParallelState) -> None:
        super().__init__()
        self.recompute = spec.recompute_modules
        core = build_core(spec.cp_comm_type, state.cp)
        if "core_attn" in self.recompute:
            core = RecomputedAttention(core)
        self.attention_norm = _norm(spec)
        self.attention = Attention(spec.index, spec.attention, state.tp, core, dtype=spec.dtype)
        self.looks_across = spec.cross_attention
        if spec.cross_attention:
            self.cross_norm = _norm(spec)
            self.cross_attention = CrossAttention(spec.index, spec.attention, state.tp, core, dtype=spec.dtype)
        self.mlp_norm = _norm(spec)
        self.mlp: MLP | SparseLayer
        self.extra_place = "none" if spec.moe is None else spec.moe.extra_ffn
        if spec.moe is not None:
            self.mlp = build_sparse(spec, spec.moe, state)
        else:
            self.mlp = build_mlp(spec, state)
        if self.extra_place != "none":
            self.extra_ffn = ExtraFFN(spec, state)

    @property
    def sparse(self) -> SparseLayer | None:
        """The sparse layer of this block, where it has one."""
        return self.mlp if isinstance(self.mlp, SparseLayer) else None

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> tuple[Tensor, RoutingReport | None]:
        hidden = hidden + self._part(self.attention, self.attention_norm, hidden, ctx)
        if self.looks_across:
            hidden = hidden + self._part(self.cross_attention, self.cross_norm, hidden, ctx)
        if self.extra_place == "before":
            hidden = self._extra(hidden, ctx)
        if isinstance(self.mlp, SparseLayer):
            routed = self._part(self.mlp, self.mlp_norm, hidden, ctx, again="moe" in self.recompute)
            hidden, report = hidden + routed.hidden, routed.report
        else:
            hidden = hidden + self._part(self.mlp, self.mlp_norm, hidden, ctx, again="mlp" in self.recompute)
            report = None
        if self.extra_place == "after":
            hidden = self._extra(hidden, ctx)
        return hidden, report

    def _extra(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        again = "mlp" in self.recompute and ctx.train
        found: Tensor = run_again(self.extra_ffn, hidden, ctx) if again else self.extra_ffn(hidden, ctx)
        return found

    def _part(self, part: nn.Module, norm: nn.Module, hidden: Tensor, ctx: ForwardContext, again: bool = False) -> Any:
        """part(norm(hidden)).   again: keeps `hidden` only; else all but the norm's output, where that is asked for."""
        if again and ctx.train:
            return run_again(lambda rows: part(norm(rows), ctx), hidden)
        normed = norm(hidden)
        if "layernorm" not in self.recompute or not ctx.train:
            return part(normed, ctx)
        with remade(normed, lambda: norm(hidden)):
            return part(normed, ctx)
