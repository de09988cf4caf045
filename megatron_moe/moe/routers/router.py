"""The interface of a router: it knows tokens and scores, no experts, and other ranks only through group_axis."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.moe.facts import Facts
from megatron_moe.moe.losses import router_losses
from megatron_moe.moe.plan import AuxLoss, RoutingPlan, TokenInfo, plan_from_choices
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A router that can be told nothing of its own."""


@dataclass(frozen=True)
class Site:
    """Where in the run a router stands.

    group_axis: the ranks that share routing groups (tp_cp).   dtype: wide (float32 in training, float64 in parity
    tests), for router arithmetic never narrows.   init_std: deviation of the model's first weights, which a router may
    use for its own.   layer: global index.   vocab_size: ids that mean something; 0 when nobody knows.
    seed: that of the run.
    """

    group_axis: Axis
    dtype: torch.dtype = torch.float32
    init_std: float = 0.02
    layer: int = 0
    vocab_size: int = 0
    seed: int = 0


class Router(nn.Module, ABC):
    """Maps tokens to a RoutingPlan. A forward pass writes nothing to self: it may run twice, or out of order.

    Parameters are made with `self.new_weight(shape, std)` so that they carry their layout: replicated, gradients summed
    over tp because each tensor-parallel rank routes other tokens. What is remembered beside parameters is made with
    `self.new_state(name, tensor)`: it is saved with the checkpoint, and only `after_step` writes to it.
    """

    Options: ClassVar[type] = NoOptions  # a dataclass: what this router alone can be told
    facts: ClassVar[Facts | None] = None  # its line in tools/list_routers.py
    unused_fields: ClassVar[tuple[str, ...]] = ()  # fields of MoEConfig that have no effect on this router
    dispatcher: ClassVar[str] = "alltoall"  # what --moe-token-dispatcher-type auto means across ranks

    # what follows from the options is set again in setup()
    is_causal: bool  # held to its word by the leak test; a causal decoder refuses False
    is_random: bool = False  # draws while training, so that two passes over a sample differ
    reads_expert_keys: bool = False  # wants TokenInfo.expert_keys
    wraps_block: ClassVar[bool] = False  # its one expert is a whole block (models/depth.py)
    expert_pools: int | None = None  # runs of experts that share their places; None = each expert has its own

    @classmethod
    @abstractmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token, which a capacity that includes k counts."""

    @classmethod
    def check_layout(cls, parallel: ParallelConfig) -> None:
        """Raises ConfigError, with the reason, for a layout on which this router cannot run."""

    def __init__(self, config: MoEConfig, hidden_size: int, options: Any, site: Site) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.options = options
        self.site = site
        self.group_axis = site.group_axis
        self.dtype = site.dtype
        self.init_std = site.init_std
        self.setup()

    def setup(self) -> None:
        """Check the options and make the parameters: here one row of weights for each expert."""
        self.weight = self.new_weight((self.config.num_experts, self.hidden_size), self.init_std)

    def new_weight(self, shape: tuple[int, ...], std: float) -> nn.Parameter:
        """A replicated parameter of normal(0, std), on meta until materialised."""
        return self.new_parameter(shape, Init(std=std))

    def new_parameter(self, shape: tuple[int, ...], init: Init) -> nn.Parameter:
        """A replicated parameter with its first values, on meta until materialised."""
        return new_parameter(ParamLayout(shape, sum_over=("tp",), init=init), dtype=self.dtype)

    def new_state(self, name: str, value: Tensor) -> None:
        """Remember `value` as self.name: the same on all ranks, no gradient, saved and loaded with the weights."""
        self.register_buffer(name, value)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, H) -> (T, E) wide, without a bias."""
        return hidden.to(self.dtype) @ self.weight.to(self.dtype).t()

    def aux_losses(
        self,
        logits: Tensor,
        scores: Tensor,
        expert_ids: Tensor | None,
        info: TokenInfo,
        *,
        convention: str = "first_choice",
    ) -> dict[str, AuxLoss]:
        """The balance and z losses that the configuration asks for; see losses.py for shapes and conventions."""
        return router_losses(
            logits, scores, expert_ids, info, config=self.config, group_axis=self.group_axis, convention=convention
        )

    def plan(
        self,
        expert_ids: Tensor,
        weights: Tensor,
        info: TokenInfo,
        *,
        scores: Tensor | None = None,
        renormalise: bool = False,
        aux_losses: dict[str, AuxLoss] | None = None,
        stats: dict[str, Tensor] | None = None,
    ) -> RoutingPlan:
        """plan_from_choices, with what the configuration says of order and confidence.

        scores: (T, E), whose largest says how sure a token is (batch-prioritised routing); None: the first weight does.
        """
        confidence = weights[:, 0] if scores is None else scores.amax(dim=1)
        return plan_from_choices(
            expert_ids,
            weights,
            info,
            num_experts=self.config.num_experts,
            k_major=self.config.slot_priority == "k_major" or self.config.token_drop_policy == "bpr",
            confidence=confidence.detach(),
            renormalise=renormalise,
            aux_losses=aux_losses,
            stats=stats,
        )

    @abstractmethod
    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H) in the model's dtype, this rank's rows only."""

    def before_step(self, progress: float) -> None:
        """0..1 of training: anneal k, noise, temperature."""

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        """Summed statistics of this layer, and of all MoE layers, after the optimizer's update; float64 on the host."""
