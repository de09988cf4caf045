"""What a schedule is: the lists that ranks play, and what it states of itself: memory, and time if stages are alike."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from megatron_moe.pipeline.actions import Action, Entry, Kind, Pipeline

Number = int | float | Fraction  # integers and fractions stay exact


@dataclass(frozen=True)
class Costs:
    """Seconds, or any other unit, that one microbatch takes in one stage."""

    forward: Number
    backward_input: Number
    backward_weight: Number
    overlap: Number = 1  # share of the shorter pass that a pair hides: 1 = a pair costs the longer one, 0 = both

    @property
    def backward(self) -> Number:
        return self.backward_input + self.backward_weight

    @property
    def pair(self) -> Number:
        return self.forward + self.backward - self.overlap * min(self.forward, self.backward)

    def of(self, kind: Kind) -> Number:
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.BACKWARD_INPUT: self.backward_input,
            Kind.BACKWARD_WEIGHT: self.backward_weight,
        }[kind]


def _no_pairs(shape: Pipeline) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A function from a pipeline's shape to the list of each rank, with what is promised of the lists.

    The letters of `bubble`: p ranks, m microbatches, v rounds; F, I and W are the costs of a forward pass and of the
    input and weight halves of a backward pass in one stage; B = I + W; P is the cost of a pair.
    """

    name: str
    make: Callable[[Pipeline], list[list[Entry]]]
    held: Callable[[Pipeline, int], int]  # of a rank: most pairs of stage and microbatch with activations in memory
    span: Callable[[Pipeline, Costs], Number]  # from first to last, all stages alike, passing on takes no time
    bubble: str  # that time less a rank's own work, on average over the ranks: a formula to be shown to people
    pairs: Callable[[Pipeline], int] = _no_pairs  # in the lists of all ranks together
    many_rounds: bool = False  # ranks may have several stages
    trains: bool = True

    def __call__(self, shape: Pipeline) -> list[list[Entry]]:
        """The entries of each rank, in the order in which it plays them.

        Raises ValueError for a shape that the schedule has no order for.
        """
        if shape.rounds > 1 and not self.many_rounds:
            raise ValueError(
                f"the schedule '{self.name}' has one stage a rank, not {shape.rounds} rounds of stages; "
                "'interleaved' has any number"
            )
        return self.make(shape)

    def work(self, shape: Pipeline, costs: Costs) -> Number:
        """What all ranks together are busy for."""
        one = costs.forward + costs.backward if self.trains else costs.forward
        hidden = costs.forward + costs.backward - costs.pair
        return shape.stages * shape.microbatches * one - self.pairs(shape) * hidden

    def idle_share(self, shape: Pipeline, costs: Costs) -> Number:
        """Of the ranks' time from first to last, the share that they wait."""
        whole = shape.ranks * self.span(shape, costs)
        return share(whole - self.work(shape, costs), whole)


def share(part: Number, whole: Number) -> Number:
    """part / whole, exact unless one is a float; 0 of nothing."""
    if not whole:
        return 0
    return part / whole if isinstance(part, float) or isinstance(whole, float) else Fraction(part) / Fraction(whole)


def alternate(forwards: list[Action], backwards: list[list[Action]], warm_up: int) -> list[Entry]:
    """`warm_up` forward passes, then a forward and a backward pass in turn, then the other backward passes.

    backwards: what belongs to each backward pass, which may be its two halves.
    """
    entries: list[Entry] = list(forwards[:warm_up])
    for number, halves in enumerate(backwards):
        entries.extend(forwards[warm_up + number : warm_up + number + 1])
        entries.extend(halves)
    return entries
