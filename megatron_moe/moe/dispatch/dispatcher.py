"""The interface of a dispatcher: it knows ranks and no scores, and has no weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.parallel.collectives import nothing
from megatron_moe.parallel.state import Axis


@dataclass(frozen=True)
class ExpertBatch:
    """The rows that this rank's experts receive."""

    rows: Tensor  # (R, H) sorted by expert
    tokens_per_expert: list[int]  # of the local experts, sums to R
    keys: Tensor | None  # (R,) int64 of the rows' tokens, where they were given
    way_home: Any  # private to the dispatcher that made it


@dataclass(frozen=True)
class NodeAxes:
    """The two halves of ep: rank of ep = between.rank · inside.size + inside.rank."""

    between: Axis  # the ranks with the same place in their nodes
    inside: Axis  # the ranks of the own node


class Dispatcher(ABC):
    """Moves tokens to the ranks of `ep` (and the parts of `etp`) that hold their experts, and answers back."""

    def __init__(self, num_experts: int, ep: Axis, etp: Axis, nodes: NodeAxes | None = None) -> None:
        """nodes: for a dispatcher that tells them apart."""
        self.num_experts = num_experts
        self.local_experts = num_experts // ep.size
        self.ep = ep
        self.etp = etp

    @abstractmethod
    def dispatch(
        self, tokens: Tensor, plan: RoutingPlan, keys: Tensor | None = None, beside: Callable[[], None] = nothing
    ) -> ExpertBatch:
        """tokens: (T, H), this rank's.   keys: (T,) int64 that travel along, for draws of the experts.   beside: called
        once, while the tokens travel."""

    @abstractmethod
    def combine(self, answers: Tensor, batch: ExpertBatch) -> Tensor:
        """answers (R, H), partial over etp -> (T, H), weighted and summed over each token's experts."""
