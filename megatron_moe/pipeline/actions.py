"""What a pipeline schedule is made of: actions, and the shape of the pipeline that they are for."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a rank does with a microbatch."""

    FORWARD = "F"
    BACKWARD = "B"  # both halves at once
    BACKWARD_INPUT = "I"  # gradient of the input, which the stage before waits for
    BACKWARD_WEIGHT = "W"  # gradient of the weights, for which nobody waits


@dataclass(frozen=True)
class Action:
    """One entry of a schedule."""

    kind: Kind
    stage: int  # global number of the stage, one of this rank's
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}.{self.microbatch}"

    @property
    def parts(self) -> tuple["Action", ...]:
        """What is done at the same time: this alone."""
        return (self,)


@dataclass(frozen=True)
class Pair:
    """The forward pass of one microbatch beside the backward pass of another: each computes while the other waits."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}|{self.backward}"

    @property
    def parts(self) -> tuple[Action, ...]:
        return (self.forward, self.backward)


Entry = Action | Pair


@dataclass(frozen=True)
class Pipeline:
    """What a schedule is a function of.

    Stage s stands on rank s mod ranks; with several rounds a rank has several stages.
    """

    ranks: int
    microbatches: int
    rounds: int = 1  # stages of each rank
    group: int | None = None  # microbatches that pass a stage before the rank turns to its next one; None: `ranks`

    @property
    def stages(self) -> int:
        return self.ranks * self.rounds

    def rank_of(self, stage: int) -> int:
        return stage % self.ranks

    def stages_of(self, rank: int) -> range:
        return range(rank, self.stages, self.ranks)


def flat(entries: Sequence[Entry]) -> list[Action]:
    """The actions of a list, those of a pair one after the other."""
    return [action for entry in entries for action in entry.parts]
