"""Schedules with one order for all: forward and backward passes in turn, a stage a rank."""

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pipeline
from megatron_moe.pipeline.schedule import Costs, Number, Schedule, alternate


def _sequential(shape: Pipeline) -> list[list[Entry]]:
    """One microbatch at a time, forward then backward: the least memory, ranks idle most of the time."""
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


def _1f1b(shape: Pipeline) -> list[list[Entry]]:
    """1F1B: rank r keeps at most ranks - r microbatches in flight.  [PipeDream-Flush, arXiv:2006.09503, section 3.2]"""
    return [_rank(rank, shape, (Kind.BACKWARD,)) for rank in range(shape.ranks)]


def _1f1b_split(shape: Pipeline) -> list[list[Entry]]:
    """1F1B with each backward pass cut in two, the weight half right after the input half: nobody waits for it."""
    return [_rank(rank, shape, (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)) for rank in range(shape.ranks)]


def _rank(rank: int, shape: Pipeline, halves: tuple[Kind, ...]) -> list[Entry]:
    numbers = range(shape.microbatches)
    forwards = [Action(Kind.FORWARD, rank, number) for number in numbers]
    backwards = [[Action(kind, rank, number) for kind in halves] for number in numbers]
    return alternate(forwards, backwards, warm_up=shape.ranks - rank - 1)


def _held(shape: Pipeline, rank: int) -> int:
    return min(shape.microbatches, shape.ranks - rank)


def _sequential_span(shape: Pipeline, costs: Costs) -> Number:
    return shape.microbatches * shape.stages * (costs.forward + costs.backward)


def _1f1b_span(shape: Pipeline, costs: Costs) -> Number:
    return (shape.microbatches + shape.ranks - 1) * (costs.forward + costs.backward)


def _1f1b_split_span(shape: Pipeline, costs: Costs) -> Number:
    work = shape.microbatches * (costs.forward + costs.backward)
    return work + (shape.ranks - 1) * (costs.forward + costs.backward_input)


SEQUENTIAL = Schedule(
    name="sequential",
    make=_sequential,
    held=lambda shape, rank: shape.rounds,
    span=_sequential_span,
    bubble="m·v·(p-1)·(F+B)",
    many_rounds=True,
)
ONE_FORWARD_ONE_BACKWARD = Schedule(name="1f1b", make=_1f1b, held=_held, span=_1f1b_span, bubble="(p-1)·(F+B)")
SPLIT = Schedule(name="1f1b_split", make=_1f1b_split, held=_held, span=_1f1b_split_span, bubble="(p-1)·(F+I)")
