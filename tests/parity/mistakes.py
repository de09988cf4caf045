"""Runs of the tiny model with one piece of the source broken."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.certify.tiny_model import tiny_config
from megatron_moe.certify.tiny_run import TOLERANCE, RankOutcome, alone, outcome_of, train_tiny, worst_difference
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import grid_of

MOE = {"router_type": "gshard", "aux_loss_coeff": 0.1, "z_loss_coeff": 0.1}


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

    def config(self, parallel: dict[str, Any], micro_batch_size: int = 1) -> RunConfig:
        return tiny_config(self.moe, parallel, self.model, micro_batch_size)

    def run(self, world_size: int, *, broken: bool = True) -> RankOutcome:
        """On this rank, with the mistake or without."""
        right = self.owner.__dict__[self.name]
        if broken:
            setattr(self.owner, self.name, self.wrong)
        try:
            config = self.config(self.parallel, self.micro_batch_size)
            return train_tiny(config, ParallelState.distributed(grid_of(config, world_size)))
        finally:
            setattr(self.owner, self.name, right)


def is_noticed(mistake: Mistake, ranks: Sequence[RankOutcome]) -> bool:
    """Whether what the ranks found differs from one process without the mistake."""
    try:
        found = outcome_of(ranks)
    except AssertionError:
        return True  # the ranks disagree, which the parity tests see as well
    return max(worst_difference(found, alone(mistake.config({}))).values()) > 1000 * TOLERANCE
