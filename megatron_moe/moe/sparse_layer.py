"""The interface of everything that may stand in a sparse layer's place, with or without a router."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from megatron_moe.layers.context import ForwardContext
from megatron_moe.moe.plan import RoutingReport


class Routed(NamedTuple):
    """What a sparse layer returns; a tuple, into which hooks on modules look for tensors."""

    hidden: Tensor
    report: RoutingReport


class SparseLayer(nn.Module, ABC):
    """A feed-forward layer of which each token uses a part. A forward pass writes nothing to self."""

    index: int  # global

    @property
    @abstractmethod
    def decider(self) -> nn.Module:
        """Who decides: the router, or the layer itself where it has none."""

    @abstractmethod
    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Routed:
        """(S/(cp·tp), B, H) under sequence parallelism, else (S/cp, B, H); the same shape back."""

    def before_step(self, progress: float) -> None:
        """0..1 of training."""

    def after_step(self, own: dict[str, Tensor], model: dict[str, Tensor]) -> None:
        """Summed statistics of this layer, and of all sparse layers, after the optimizer's update."""
