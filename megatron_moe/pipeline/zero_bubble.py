"""ZB-H1: weight halves of backward passes, for which nobody waits, fill time in which a rank would wait.

    3 ranks, 4 microbatches, backward passes in the halves I and W
    rank 0  F0F1F2....I0W0F3I1W1I2W2I3W3
    rank 1  ..F0F1..I0F2I1W0F3I2W1I3W2W3
    rank 2  ....F0I0F1I1F2I2W0F3I3W1W2W3

[Qi et al., Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 2.2]
"""

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pipeline
from megatron_moe.pipeline.schedule import Costs, Number, Schedule, alternate


def _zb_h1(shape: Pipeline) -> list[list[Entry]]:
    """1F1B, with the weight halves on rank r late by r microbatches.

    Rank r of 1F1B has ranks - r microbatches in flight; r more that wait for their weight half make it `ranks` on each
    rank, what 1F1B has on the first one. The last rank passes gradients on r weight halves earlier, and so all stop
    earlier.
    """
    return [_rank(rank, shape) for rank in range(shape.ranks)]


def _rank(rank: int, shape: Pipeline) -> list[Entry]:
    numbers = range(shape.microbatches)
    forwards = [Action(Kind.FORWARD, rank, number) for number in numbers]
    weights = [Action(Kind.BACKWARD_WEIGHT, rank, number) for number in numbers]
    backwards = [[Action(Kind.BACKWARD_INPUT, rank, number)] for number in numbers]
    for late, weight in zip(backwards[rank:], weights, strict=False):
        late.append(weight)
    left = max(0, shape.microbatches - rank)
    return [*alternate(forwards, backwards, warm_up=shape.ranks - rank - 1), *weights[left:]]


def _held(shape: Pipeline, rank: int) -> int:
    return min(shape.microbatches, shape.ranks)


def _span(shape: Pipeline, costs: Costs) -> Number:
    """The bubble of 1F1B with split passes, less the weight halves that the last rank does after its last input half.

    A weight half fills no more than the forward pass or the input half that it gives way to.
    """
    work = shape.microbatches * (costs.forward + costs.backward)
    late = min(shape.microbatches, shape.ranks) - 1
    filled = min(costs.forward, costs.backward_input, costs.backward_weight)
    return work + (shape.ranks - 1) * (costs.forward + costs.backward_input) - late * filled


ZB_H1 = Schedule(name="zb_h1", make=_zb_h1, held=_held, span=_span, bubble="(p-1)·(F+I-min(F,I,W)) for m >= p")
