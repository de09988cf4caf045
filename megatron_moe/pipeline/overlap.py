"""1F1B of pairs: the forward pass of one microbatch beside the backward pass of another, so that each computes while
the other's tokens travel between the experts' ranks.

    2 ranks, 4 microbatches; P3/0 = F3 and B0; a backward pass and a pair take as long as two forward passes
    rank 0  F0F1F2..P3/0B1--B2--B3--
    rank 1  ..F0P1/0P2/1P3/2B3--....
"""

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pair, Pipeline
from megatron_moe.pipeline.schedule import Costs, Number, Schedule


def _1f1b_overlap(shape: Pipeline) -> list[list[Entry]]:
    return [_rank(rank, shape) for rank in range(shape.ranks)]


def _rank(rank: int, shape: Pipeline) -> list[Entry]:
    warm_up = _warm_up(shape, rank)
    forwards = [Action(Kind.FORWARD, rank, number) for number in range(shape.microbatches)]
    backwards = [Action(Kind.BACKWARD, rank, number) for number in range(shape.microbatches)]
    pairs = [Pair(*both) for both in zip(forwards[warm_up:], backwards, strict=False)]
    return [*forwards[:warm_up], *pairs, *backwards[len(pairs) :]]


def _warm_up(shape: Pipeline, rank: int) -> int:
    """A pair waits for the pair of the rank behind, which waits for the pair before the last one here: two a rank."""
    return min(shape.microbatches, 2 * (shape.ranks - 1 - rank) + 1)


def _held(shape: Pipeline, rank: int) -> int:
    """The forward pass of a pair begins while the microbatch of its backward pass is still held."""
    return min(shape.microbatches, _warm_up(shape, rank) + 1)


def _span(shape: Pipeline, costs: Costs) -> Number:
    return shape.ranks * (costs.forward + costs.backward) + (shape.microbatches - 1) * costs.pair


def _pairs(shape: Pipeline) -> int:
    """Microbatches after the warm-up, summed over the ranks; ranks far from the last one may have none."""
    ranks = min(shape.ranks, shape.microbatches // 2)
    return ranks * (shape.microbatches - ranks)


OVERLAP = Schedule(
    name="1f1b_overlap", make=_1f1b_overlap, held=_held, span=_span, pairs=_pairs, bubble="(p-1)·P for m >= 2p"
)
