"""The interface of a sparse layer that is no assignment of tokens to experts; chosen by name like a router."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_moe.config.moe import PLACES, MoEConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.plan import RoutingReport, TokenInfo
from megatron_moe.moe.routers.router import NoOptions
from megatron_moe.moe.sparse_layer import Routed, SparseLayer
from megatron_moe.moe.token_info import token_info
from megatron_moe.ops.activation import products_of
from megatron_moe.parallel.collectives import gather_from, split_to
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import ParallelState


@dataclass(frozen=True, kw_only=True)
class LayerSite:
    """Where an unrouted layer stands and how wide it is. dtype: the model's; wide: that of scores."""

    index: int
    hidden_size: int
    ffn_size: int  # inner width of one expert
    activation: str
    init_std: float
    output_std: float
    dtype: torch.dtype
    state: ParallelState

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


# what only a layer that sends tokens to experts reads
ROUTED_ONLY = (
    *("router_pre_softmax", "aux_loss_coeff", "z_loss_coeff", "expert_bias", "expert_dropout"),
    *("expert_capacity_factor", *PLACES),
    *("shared_expert_intermediate_size", "shared_expert_gate", "shared_expert_overlap"),
)


@dataclass(frozen=True)
class Mixed:
    """The answers to this rank's tokens, (T, H), and what there is to report."""

    answers: Tensor
    report: RoutingReport


class UnroutedLayer(SparseLayer):
    """Built like a router, from [moe] and its Options; it does the whole layer's work itself."""

    Options: ClassVar[type] = NoOptions
    facts: ClassVar[Facts | None] = None
    unused_fields: ClassVar[tuple[str, ...]] = ()
    is_random: bool = False
    is_causal: bool

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """How many experts, or runs of cells of an expert's width, a token uses."""
        return config.router_topk

    @classmethod
    def check_layout(cls, parallel: ParallelConfig) -> None:
        """Raises ConfigError, with the reason, for a layout on which this layer cannot run."""

    def __init__(self, config: MoEConfig, options: Any, site: LayerSite) -> None:
        super().__init__()
        self.config = config
        self.options = options
        self.site = site
        self.index = site.index
        self.tp, self.ep, self.etp = site.state.tp, site.state.ep, site.state.etp
        self.group_axis = site.state.tp_cp
        self.setup()

    @abstractmethod
    def setup(self) -> None:
        """Check the options and make the parameters."""

    @property
    def decider(self) -> nn.Module:
        return self

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Routed:
        rows = hidden if ctx.sequence_parallel else split_to(hidden, self.tp)
        info = token_info(ctx, self.tp, self.index, self.config.routing_group_samples)
        mixed = self.mix(rows.flatten(0, 1), info, ctx)
        out = mixed.answers.masked_fill(info.is_padding[:, None], 0.0).view(rows.shape)
        if not ctx.sequence_parallel:
            out = gather_from(out, self.tp, ctx.view.num_rows)
        return Routed(out, mixed.report)

    @abstractmethod
    def mix(self, tokens: Tensor, info: TokenInfo, ctx: ForwardContext) -> Mixed:
        """tokens: (T, H), this rank's rows, position-major: (rows, samples, H) flattened."""

    def forward_flops(self, length: int) -> float:
        """Of the matrix products for one token of a sample of so many, in training; what chooses is not counted."""
        site = self.site
        return float(products_of(site.activation) * site.hidden_size * site.ffn_size * self.choices(self.config))

    def new_weight(self, shape: tuple[int, ...], std: float) -> nn.Parameter:
        """A replicated wide parameter, as a router's: each tensor-parallel rank sees other tokens."""
        return self.new_parameter(shape, Init(std=std))

    def new_parameter(self, shape: tuple[int, ...], init: Init) -> nn.Parameter:
        """The same with other first values."""
        return new_parameter(ParamLayout(shape, sum_over=("tp",), init=init), dtype=self.site.wide)

    def new_experts(self) -> Experts:
        """As many and as wide as in a routed layer, under the same names in a checkpoint."""
        site = self.site
        return Experts(
            self.config.num_experts,
            site.hidden_size,
            site.ffn_size,
            site.activation,
            self.ep,
            self.etp,
            init_std=site.init_std,
            output_std=site.output_std,
            dtype=site.dtype,
        )

    def new_state(self, name: str, value: Tensor) -> None:
        """Remember `value` as self.name: the same on all ranks, no gradient, saved and loaded with the weights."""
        self.register_buffer(name, value)

    def report(self, info: TokenInfo, tokens_per_expert: Tensor, stats: dict[str, Tensor]) -> RoutingReport:
        """tokens_per_expert: (E,) uses of each expert, or run of cells of an expert's width, by local tokens."""
        unserved = torch.zeros((), dtype=torch.int64, device=tokens_per_expert.device)
        counts = {
            "requested": tokens_per_expert,
            "tokens_per_expert": tokens_per_expert,
            "tokens": (~info.is_padding).sum(),
            "tokens_unserved": unserved,
        }
        return RoutingReport(self.index, {}, {**counts, **stats})
