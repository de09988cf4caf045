"""Several stages a rank: groups of microbatches pass a stage before the rank turns to its next one.

    2 ranks, 4 microbatches, 2 rounds: F and B on the stages 0 and 1, f and b on 2 and 3, all equally long
    rank 0  F0F1f0f1F2b0F3b1f2B0f3B1..b2..b3B2B3
    rank 1  ..F0F1f0b0f1b1F2B0F3B1f2b2f3b3B2B3..

[Narayanan et al., arXiv:2104.04473, section 2.2; the order is that of Megatron-LM core/pipeline_parallel/schedules.py]
"""

from collections.abc import Iterator

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pipeline
from megatron_moe.pipeline.schedule import Costs, Number, Schedule, alternate


def group_sizes(shape: Pipeline) -> list[int]:
    """Microbatches of each group: `shape.group`, and what is left in a last group.

    A group smaller than the pipeline leaves ranks without work between two rounds, or makes them wait for each other
    forever. So a rest that is too small is spread over the other groups; where all microbatches together are too few,
    they are one group.
    Raises ValueError when the group asked for is too small.
    """
    size = shape.ranks if shape.group is None else shape.group
    if size < shape.ranks:
        raise ValueError(
            f"a group of {size} microbatches is too small for {shape.ranks} pipeline ranks: a rank would turn to its "
            f"next stage before anything arrives there; use {shape.ranks} or more"
        )
    full, rest = divmod(shape.microbatches, size)
    if full == 0 or rest == 0 or rest >= shape.ranks:
        return [size] * full + [rest] * (rest > 0)
    return [size + rest // full + (number < rest % full) for number in range(full)]


def _passes(shape: Pipeline, kind: Kind, rank: int) -> Iterator[Action]:
    """All passes of a rank, group after group; the last stage comes first in the backward passes."""
    start = 0
    stages = shape.stages_of(rank)
    for size in group_sizes(shape):
        for stage in stages if kind is Kind.FORWARD else reversed(stages):
            yield from (Action(kind, stage, number) for number in range(start, start + size))
        start += size


def _warm_up(shape: Pipeline, rank: int) -> int:
    """Forward passes before the turns begin.

    The last rank must have brought the largest group to its last stage. Two more for each rank before it, as in
    Megatron-LM: the first rank has work until the first gradient reaches it, and what is sent has a turn to arrive.
    """
    return (shape.rounds - 1) * max(group_sizes(shape)) + 2 * (shape.ranks - 1 - rank)


def _interleaved(shape: Pipeline) -> list[list[Entry]]:
    return [
        alternate(
            list(_passes(shape, Kind.FORWARD, rank)),
            [[action] for action in _passes(shape, Kind.BACKWARD, rank)],
            _warm_up(shape, rank),
        )
        for rank in range(shape.ranks)
    ]


def _forward_only(shape: Pipeline) -> list[list[Entry]]:
    return [list(_passes(shape, Kind.FORWARD, rank)) for rank in range(shape.ranks)]


def _held(shape: Pipeline, rank: int) -> int:
    return min(shape.rounds * shape.microbatches, _warm_up(shape, rank) + 1)


def _turns(shape: Pipeline) -> int:
    """Passes one after the other: m·v + p - 1; fewer microbatches than ranks wait between their rounds."""
    fewer, more = sorted((shape.microbatches, shape.ranks))
    return shape.rounds * more + fewer - 1


def _interleaved_span(shape: Pipeline, costs: Costs) -> Number:
    return _turns(shape) * (costs.forward + costs.backward)


def _forward_only_span(shape: Pipeline, costs: Costs) -> Number:
    return _turns(shape) * costs.forward


# costs are those of one stage, a v-th of the rank's layers: against 1F1B, a v-th of the bubble
INTERLEAVED = Schedule(
    name="interleaved",
    make=_interleaved,
    held=_held,
    span=_interleaved_span,
    bubble="(p-1)·(F+B) for m >= p",
    many_rounds=True,
)
# evaluation: nothing is kept for a backward pass
FORWARD_ONLY = Schedule(
    name="forward_only",
    make=_forward_only,
    held=lambda shape, rank: 0,
    span=_forward_only_span,
    bubble="(p-1)·F for m >= p",
    many_rounds=True,
    trains=False,
)
