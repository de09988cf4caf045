"""Pipeline schedules as data: for each rank, the list of entries that it plays.

A schedule is a pure function of the pipeline's shape. `verify.py` proves any such list complete, ordered and free of
deadlock.
"""

from collections.abc import Callable

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pair, Pipeline

Schedule = Callable[[Pipeline], list[list[Entry]]]


def sequential(shape: Pipeline) -> list[list[Entry]]:
    """One microbatch at a time, forward then backward: the least memory, stages idle most of the time."""
    both = (Kind.FORWARD, Kind.BACKWARD)
    return [
        [Action(kind, rank, number) for number in range(shape.microbatches) for kind in both]
        for rank in range(shape.ranks)
    ]


def one_forward_one_backward(shape: Pipeline) -> list[list[Entry]]:
    """1F1B: stage r keeps at most stages - r microbatches in flight.  [PipeDream-Flush, arXiv:2006.09503]"""
    return [_1f1b_rank(rank, shape, split=False) for rank in range(shape.ranks)]


def split_one_forward_one_backward(shape: Pipeline) -> list[list[Entry]]:
    """1F1B with each backward pass cut in two, the weight half right after the input half."""
    return [_1f1b_rank(rank, shape, split=True) for rank in range(shape.ranks)]


def _1f1b_rank(rank: int, shape: Pipeline, split: bool) -> list[Entry]:
    warm_up = min(shape.ranks - rank - 1, shape.microbatches)
    halves = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if split else (Kind.BACKWARD,)
    actions: list[Entry] = [Action(Kind.FORWARD, rank, number) for number in range(warm_up)]
    for number in range(shape.microbatches):
        if warm_up + number < shape.microbatches:
            actions.append(Action(Kind.FORWARD, rank, warm_up + number))
        actions.extend(Action(kind, rank, number) for kind in halves)
    return actions


def overlapped_one_forward_one_backward(shape: Pipeline) -> list[list[Entry]]:
    """1F1B in which the forward pass of one microbatch runs beside the backward pass of another."""
    lists: list[list[Entry]] = []
    for rank in range(shape.ranks):
        warm_up = min(2 * (shape.ranks - 1 - rank) + 1, shape.microbatches)
        forward = [Action(Kind.FORWARD, rank, number) for number in range(shape.microbatches)]
        backward = [Action(Kind.BACKWARD, rank, number) for number in range(shape.microbatches)]
        pairs = [Pair(ahead, behind) for ahead, behind in zip(forward[warm_up:], backward, strict=False)]
        lists.append([*forward[:warm_up], *pairs, *backward[len(pairs) :]])
    return lists


def forward_only(shape: Pipeline) -> list[list[Entry]]:
    """Evaluation: a microbatch after the other through all rounds."""
    return [
        [
            Action(Kind.FORWARD, stage, number)
            for number in range(shape.microbatches)
            for stage in shape.stages_of(rank)
        ]
        for rank in range(shape.ranks)
    ]


SCHEDULES: dict[str, Schedule] = {
    "sequential": sequential,
    "1f1b": one_forward_one_backward,
    "1f1b_split": split_one_forward_one_backward,
    "1f1b_overlap": overlapped_one_forward_one_backward,
}
