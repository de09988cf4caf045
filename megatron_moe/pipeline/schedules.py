"""Pipeline schedules as data: for each rank, the list of entries that it plays.

A schedule is a pure function of the pipeline's shape. `verify.py` proves any such list complete, ordered and free of
deadlock.
"""

from collections.abc import Callable

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pipeline

Schedule = Callable[[Pipeline], list[list[Entry]]]


def sequential(shape: Pipeline) -> list[list[Entry]]:
    """One microbatch at a time, forward then backward: the least memory, stages idle most of the time."""
    return [
        [
            Action(kind, stage, number)
            for number in range(shape.microbatches)
            for kind, stages in (
                (Kind.FORWARD, shape.stages_of(rank)),
                (Kind.BACKWARD, reversed(shape.stages_of(rank))),
            )
            for stage in stages
        ]
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


def interleaved(shape: Pipeline) -> list[list[Entry]]:
    """1F1B over several stages of each rank, a group of microbatches at a time.  [Megatron-LM, arXiv:2104.04473]"""
    return [_interleaved_rank(rank, shape) for rank in range(shape.ranks)]


def _interleaved_rank(rank: int, shape: Pipeline) -> list[Entry]:
    groups = _groups(shape)
    stages = shape.stages_of(rank)
    forward: list[Entry] = [Action(Kind.FORWARD, s, number) for g in groups for s in stages for number in g]
    backward: list[Entry] = [Action(Kind.BACKWARD, s, number) for g in groups for s in reversed(stages) for number in g]
    warm_up = min(2 * (shape.ranks - rank - 1) + (shape.rounds - 1) * max(map(len, groups)), len(forward))
    pairs = zip(forward[warm_up:], backward, strict=False)
    rest = backward[len(forward) - warm_up :]
    return [*forward[:warm_up], *(action for pair in pairs for action in pair), *rest]


def _groups(shape: Pipeline) -> list[range]:
    """Microbatches that turn to the next stage together; a rest of fewer than there are ranks joins the last group."""
    group = shape.group or shape.ranks
    starts = list(range(0, shape.microbatches, group))
    if len(starts) > 1 and shape.microbatches - starts[-1] < shape.ranks:
        starts.pop()
    return [range(*pair) for pair in zip(starts, [*starts[1:], shape.microbatches], strict=True)]


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
    "interleaved": interleaved,
}
