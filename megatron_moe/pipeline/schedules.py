"""Pipeline schedules as data: for each rank, the list of actions that it plays.

A schedule is a pure function of (stages, microbatches). `check_schedule` proves any such list complete, ordered and
free of deadlock, by playing it with blocking receives and unbounded sends.
"""

from collections.abc import Callable
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


Schedule = Callable[[int, int], list[list[Action]]]


def sequential(num_stages: int, num_microbatches: int) -> list[list[Action]]:
    """One microbatch at a time, forward then backward: the least memory, stages idle most of the time."""
    return [
        [Action(kind, rank, number) for number in range(num_microbatches) for kind in (Kind.FORWARD, Kind.BACKWARD)]
        for rank in range(num_stages)
    ]


def one_forward_one_backward(num_stages: int, num_microbatches: int) -> list[list[Action]]:
    """1F1B: stage r keeps at most stages - r microbatches in flight.  [PipeDream-Flush, arXiv:2006.09503]"""
    return [_1f1b_rank(rank, num_stages, num_microbatches, split=False) for rank in range(num_stages)]


def split_one_forward_one_backward(num_stages: int, num_microbatches: int) -> list[list[Action]]:
    """1F1B with each backward pass cut in two, the weight half right after the input half."""
    return [_1f1b_rank(rank, num_stages, num_microbatches, split=True) for rank in range(num_stages)]


def _1f1b_rank(rank: int, num_stages: int, num_microbatches: int, split: bool) -> list[Action]:
    warm_up = min(num_stages - rank - 1, num_microbatches)
    halves = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if split else (Kind.BACKWARD,)
    actions = [Action(Kind.FORWARD, rank, number) for number in range(warm_up)]
    for number in range(num_microbatches):
        if warm_up + number < num_microbatches:
            actions.append(Action(Kind.FORWARD, rank, warm_up + number))
        actions.extend(Action(kind, rank, number) for kind in halves)
    return actions


def forward_only(num_stages: int, num_microbatches: int) -> list[list[Action]]:
    """Evaluation."""
    return [[Action(Kind.FORWARD, rank, number) for number in range(num_microbatches)] for rank in range(num_stages)]


SCHEDULES: dict[str, Schedule] = {
    "sequential": sequential,
    "1f1b": one_forward_one_backward,
    "1f1b_split": split_one_forward_one_backward,
}


def needs(action: Action, num_stages: int) -> list[Action]:
    """The actions that must be over before this one can start."""
    kind, stage, number = action.kind, action.stage, action.microbatch
    if kind is Kind.FORWARD:
        return [Action(Kind.FORWARD, stage - 1, number)] if stage else []
    if kind is Kind.BACKWARD_WEIGHT:
        return [Action(Kind.BACKWARD_INPUT, stage, number)]
    # the input half and the whole pass wait for the same: the gradient from the stage behind
    return [Action(Kind.FORWARD, stage, number)] + (
        [Action(Kind.BACKWARD_INPUT, stage + 1, number)] if stage + 1 < num_stages else []
    )


def _marks(action: Action) -> set[Action]:
    """What is over once this action is: a whole backward pass is both halves."""
    if action.kind is Kind.BACKWARD:
        halves = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
        return {Action(kind, action.stage, action.microbatch) for kind in halves}
    return {action}


def check_schedule(lists: list[list[Action]], num_stages: int, num_microbatches: int, *, train: bool = True) -> None:
    """Raises ValueError unless every stage does everything once, in an order that never waits forever."""
    kinds = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if train else (Kind.FORWARD,)
    wanted = {
        Action(kind, stage, number)
        for kind in kinds
        for stage in range(num_stages)
        for number in range(num_microbatches)
    }
    done: set[Action] = set()
    position = [0] * len(lists)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while position[rank] < len(actions) and all(
                need in done for need in needs(actions[position[rank]], num_stages)
            ):
                marks = _marks(actions[position[rank]])
                if marks & done:
                    raise ValueError(f"rank {rank} does {actions[position[rank]]} twice")
                done |= marks
                position[rank] += 1
                moved = True
    stuck = [f"rank {rank} at {lists[rank][at]}" for rank, at in enumerate(position) if at < len(lists[rank])]
    if stuck:
        raise ValueError(f"the schedule waits forever: {', '.join(stuck)}")
    if done != wanted:
        missing = sorted(map(str, wanted - done)) or sorted(map(str, done - wanted))
        raise ValueError(f"the schedule is not complete, or does too much: {missing[:5]}")
    _check_order(lists, num_stages)


def _check_order(lists: list[list[Action]], num_stages: int) -> None:
    """Tensors carry no numbers: a rank must receive from each neighbour in the order in which that one sends."""
    owner = {action.stage: rank for rank, actions in enumerate(lists) for action in actions}
    for kinds, onward in (((Kind.FORWARD,), 1), ((Kind.BACKWARD, Kind.BACKWARD_INPUT), -1)):
        sent: dict[tuple[int, int], list[tuple[int, int]]] = {}
        received: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for rank, actions in enumerate(lists):
            for action in actions:
                if action.kind not in kinds:
                    continue
                if 0 <= action.stage + onward < num_stages:
                    to = owner[action.stage + onward]
                    sent.setdefault((rank, to), []).append((action.stage, action.microbatch))
                if 0 <= action.stage - onward < num_stages:
                    source = owner[action.stage - onward]
                    received.setdefault((source, rank), []).append((action.stage - onward, action.microbatch))
        for pair in sent:
            if pair[0] != pair[1] and sent[pair] != received[pair]:
                raise ValueError(f"rank {pair[1]} does not receive from rank {pair[0]} in the order in which it sends")
