"""The interface of a router: it knows tokens and scores, no experts, and other ranks only through group_axis."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.losses import router_losses
from megatron_moe.moe.plan import AuxLoss, RoutingPlan, TokenInfo
from megatron_moe.parallel.layout import Init, ParamLayout, new_parameter
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A router that can be told nothing of its own."""


class Router(nn.Module, ABC):
    """Maps tokens to a RoutingPlan. A forward pass writes nothing to self: it may run twice, or out of order.

    Parameters are made with `self.new_weight(shape, std)` so that they carry their layout: replicated, gradients summed
    over tp because each tensor-parallel rank routes other tokens.
    """

    Options: ClassVar[type] = NoOptions  # a dataclass: what this router alone can be told
    is_causal: ClassVar[bool]  # held to its word by the leak test; a causal decoder refuses False
    unused_fields: ClassVar[tuple[str, ...]] = ()  # fields of MoEConfig that have no effect on this router

    @classmethod
    @abstractmethod
    def choices(cls, config: MoEConfig) -> int:
        """Assignments of one token, which a capacity that includes k counts."""

    def __init__(
        self, config: MoEConfig, hidden_size: int, options: Any, group_axis: Axis, dtype: torch.dtype, init_std: float
    ) -> None:
        """dtype: wide (float32 in training, float64 in parity tests), for router arithmetic never narrows.

        init_std: deviation of the model's first weights, which a router may use for its own.
        """
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.options = options
        self.group_axis = group_axis
        self.dtype = dtype
        self.init_std = init_std
        self.setup()

    def setup(self) -> None:
        """Check the options and make the parameters: here one row of weights for each expert."""
        self.weight = self.new_weight((self.config.num_experts, self.hidden_size), self.init_std)

    def new_weight(self, shape: tuple[int, ...], std: float) -> nn.Parameter:
        """A replicated parameter of normal(0, std), on meta until materialised."""
        layout = ParamLayout(shape, sum_over=("tp",), init=Init(std=std))
        return new_parameter(layout, dtype=self.dtype)

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

    @abstractmethod
    def forward(self, tokens: Tensor, info: TokenInfo) -> RoutingPlan:
        """tokens: (T, H) in the model's dtype, this rank's rows only."""

    def before_step(self, progress: float) -> None:
        """0..1 of training: anneal k, noise, temperature."""

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        """Summed statistics of this layer, and of all MoE layers, after the optimizer's update."""
