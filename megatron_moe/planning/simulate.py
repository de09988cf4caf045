"""Plays a schedule with costs instead of doing it: what every rank does when, and how long it waits."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.pipeline.actions import Action, Entry, Pipeline
from megatron_moe.pipeline.schedule import Costs, Number, share
from megatron_moe.pipeline.verify import marks, most_held, needs


@dataclass(frozen=True)
class Turn:
    """One entry of a rank's list, from start to end in the unit of the costs."""

    entry: Entry
    start: Number
    end: Number


@dataclass(frozen=True)
class Timeline:
    """What each rank does when. Times are exact where costs are integers or fractions."""

    ranks: list[list[Turn]]
    held: list[int]  # of each rank: most pairs of stage and microbatch whose activations it holds at once

    @property
    def total(self) -> Number:
        """From the first start to the last end of all ranks."""
        return max((turn.end for turns in self.ranks for turn in turns), default=0)

    @property
    def busy(self) -> list[Number]:
        """Of each rank."""
        return [sum(turn.end - turn.start for turn in turns) for turns in self.ranks]

    @property
    def idle_share(self) -> Number:
        """Of the ranks' time from first to last, the share that they wait; 0 when nothing takes time."""
        whole = len(self.ranks) * self.total
        return share(whole - sum(self.busy), whole)


def simulate(
    lists: Sequence[Sequence[Entry]], shape: Pipeline, costs: Sequence[Costs] | Costs, *, latency: Number = 0
) -> Timeline:
    """Plays the lists of all ranks.

    costs: of each stage, or one for all.  latency: from the end of an action until what it sends has reached another
    rank; the sender goes on.  A pair begins when both halves can, and hands both results on when it ends.
    Raises ValueError when the ranks wait for each other forever.
    """
    each = [costs] * shape.stages if isinstance(costs, Costs) else costs
    if len(each) != shape.stages:
        raise ValueError(f"costs of {len(each)} stages were given for a pipeline of {shape.stages}")
    over: dict[Action, Number] = {}  # when what an action needs is there
    turns: list[list[Turn]] = [[] for _ in lists]
    up_and_down = [*range(len(lists)), *reversed(range(len(lists)))]  # the ways of activations and of gradients
    moved = True
    while moved:
        moved = False
        for rank in up_and_down:
            while len(turns[rank]) < len(lists[rank]):
                entry = lists[rank][len(turns[rank])]
                ready = _ready(entry, rank, over, shape, latency)
                if ready is None:
                    break
                start = max(ready, turns[rank][-1].end if turns[rank] else 0)
                end = start + _cost(entry, each)
                turns[rank].append(Turn(entry, start, end))
                over.update({mark: end for action in entry.parts for mark in marks(action)})
                moved = True
    if any(len(played) < len(entries) for played, entries in zip(turns, lists, strict=True)):
        raise ValueError("the schedule waits forever; verify.py says where")
    return Timeline(turns, [most_held(entries) for entries in lists])


def _cost(entry: Entry, costs: Sequence[Costs]) -> Number:
    parts = [costs[action.stage].of(action.kind) for action in entry.parts]
    hidden = costs[entry.parts[0].stage].overlap * min(parts) if len(parts) > 1 else 0
    return sum(parts) - hidden


def _ready(entry: Entry, rank: int, over: dict[Action, Number], shape: Pipeline, latency: Number) -> Number | None:
    """When all that an entry needs has reached its rank; None when that is not known yet."""
    ready: Number = 0
    for need in (need for action in entry.parts for need in needs(action, shape.stages)):
        if need not in over:
            return None
        ready = max(ready, over[need] + (latency if shape.rank_of(need.stage) != rank else 0))
    return ready
