"""Runs of the tiny model with one piece of the source broken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.certify.tiny_run import TOLERANCE, RankOutcome, alone, outcome_of, train_tiny, worst_difference
from megatron_moe.config.errors import ReplicaError
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.state import ParallelState
from megatron_moe.parallel.wrapped import Wrapped
from megatron_moe.training.engine import grid_of

MOE = {"router_type": "gshard", "aux_loss_coeff": 0.1, "z_loss_coeff": 0.1}


class _WhenAsked(Arrival):
    """A tensor that does not come by itself."""

    def __init__(self, fetch: Callable[[], Tensor]) -> None:
        self._fetch = fetch

    def wait(self) -> Tensor:
        return self._fetch()

    def is_here(self) -> bool:
        return False


class _LazyGathers(Wrapped):
    """The slowest network there is, for what is gathered in place: nothing arrives before it is waited for."""

    def arriving(self, arrival: Arrival) -> Arrival:
        return arrival

    def start_all_gather_(self, whole: Tensor, own: Tensor) -> Arrival:
        return _WhenAsked(lambda: self.inner.start_all_gather_(whole, own).wait())


def lazy_gathers(state: ParallelState) -> ParallelState:
    """The same ranks; weights arrive only where they are waited for, so that a missing wait always shows."""
    changed = {axis.name: replace(axis, comm=_LazyGathers(axis.comm)) for axis in (state.dp_cp, state.edp)}
    return replace(state, **changed)


def as_it_is(state: ParallelState) -> ParallelState:
    return state


@dataclass(frozen=True)
class Mistake:
    """`owner.name` replaced by something wrong, and a model and a layout of two ranks on which that must show."""

    owner: Any
    name: str
    wrong: Any
    parallel: dict[str, Any]  # fields of [parallel]
    moe: Mapping[str, Any] = field(default_factory=lambda: MOE)
    model: Mapping[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 1
    network: Callable[[ParallelState], ParallelState] = as_it_is

    def config(self, parallel: dict[str, Any], micro_batch_size: int = 1) -> RunConfig:
        return tiny_config(self.moe, parallel, self.model, micro_batch_size)

    def run(self, world_size: int, *, broken: bool = True) -> RankOutcome:
        """On this rank, with the mistake or without."""
        right = self.owner.__dict__[self.name]
        if broken:
            setattr(self.owner, self.name, self.wrong)
        try:
            config = self.config(self.parallel, self.micro_batch_size)
            return train_tiny(config, self.network(ParallelState.distributed(grid_of(config, world_size))))
        finally:
            setattr(self.owner, self.name, right)


def is_noticed(mistake: Mistake, ranks: Sequence[RankOutcome]) -> bool:
    """Whether what the ranks found differs from one process without the mistake."""
    try:
        found = outcome_of(ranks)
    except ReplicaError:
        return True  # the ranks disagree, which the parity tests see as well
    return max(worst_difference(found, alone(mistake.config({}))).values()) > 1000 * TOLERANCE
