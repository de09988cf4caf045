"""Whether ranks that talk to each other mean each other, and say the same things in the same order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.recording import Tally
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.actions import Entry, Kind, Pipeline, flat

AXES = tuple(axis.name for axis in fields(ParallelState))


@dataclass
class Diary(Tally):
    """A tally that also keeps the order: kind and bytes of each call."""

    entries: list[tuple[str, int]] = field(default_factory=list)

    def add(self, kind: str, sent: int, times: int = 1) -> None:
        super().add(kind, sent, times)
        self.entries += [(kind, sent)] * times


def axis_problems(grid: Grid) -> list[str]:
    """Every axis of every rank: it holds the rank, and all ranks on it list the same ones."""
    problems = []
    for name in AXES:
        lists = [grid.axis_ranks(name.removesuffix("_back"), rank) for rank in range(grid.world_size)]
        for rank, ranks in enumerate(lists):
            if rank not in ranks or len(set(ranks)) != len(ranks):
                problems.append(f"{name} of rank {rank} is {ranks}")
            elif rank == ranks[0]:
                strangers = [one for one in ranks if lists[one] != ranks]
                problems += [f"rank {rank} lists {one} on {name}, not the reverse" for one in strangers]
            elif lists[ranks[0]] != ranks:
                problems.append(f"rank {rank} lists {ranks[0]} on {name}, not the reverse")
    return problems


@dataclass(frozen=True)
class Passed:
    """One tensor between two ranks of a pipeline."""

    channel: str  # an axis, onward or back: from the last rank on to the first it is another one
    source: int  # places on the axis
    target: int
    stage: int  # that the edge leads into
    microbatch: int
    name: str
    size: int  # bytes


Edges = Mapping[int, Mapping[str, int]]  # bytes of each tensor, by the stage that is given them


def sent_and_received(entries: Sequence[Entry], shape: Pipeline, edges: Edges) -> tuple[list[Passed], list[Passed]]:
    """What one rank sends and what it waits for, in its order, when it plays its list."""
    sends: list[Passed] = []
    receives: list[Passed] = []

    def tensors(channel: str, source: int, target: int, into: int, microbatch: int) -> list[Passed]:
        ranks = shape.rank_of(source), shape.rank_of(target)
        if ranks[0] == ranks[1]:  # a rank alone hands its tensors to itself
            return []
        return [
            Passed(_channel(shape, into, channel), *ranks, into, microbatch, name, size)
            for name, size in edges[into].items()
        ]

    for action in flat(entries):
        stage, number = action.stage, action.microbatch
        if action.kind is Kind.FORWARD:
            if stage:
                receives += tensors("pp", stage - 1, stage, stage, number)
            if stage + 1 < shape.stages:
                sends += tensors("pp", stage, stage + 1, stage + 1, number)
        elif action.kind is not Kind.BACKWARD_WEIGHT:
            if stage + 1 < shape.stages:
                receives += tensors("pp_back", stage + 1, stage, stage + 1, number)
            if stage:
                sends += tensors("pp_back", stage, stage - 1, stage, number)
    return sends, receives


def _channel(shape: Pipeline, into: int, direction: str) -> str:
    """Of the edge into a stage."""
    return direction if shape.rank_of(into) else direction.replace("pp", "pp_wrap")


def transfer_problems(lists: Sequence[Sequence[Entry]], shape: Pipeline, edges: Sequence[Edges]) -> list[str]:
    """One pipeline: what each rank sends another is what that one waits for, in the same order on each channel.

    edges: as each rank sees them.
    """
    told = [sent_and_received(entries, shape, seen) for entries, seen in zip(lists, edges, strict=True)]
    problems = []
    for source, (sends, _) in enumerate(told):
        for target, (_, receives) in enumerate(told):
            for channel in ("pp", "pp_back", "pp_wrap", "pp_wrap_back"):
                gone = [one for one in sends if (one.channel, one.target) == (channel, target)]
                come = [one for one in receives if (one.channel, one.source) == (channel, source)]
                if gone != come:
                    first = next((pair for pair in zip(gone, come, strict=False) if pair[0] != pair[1]), (gone, come))
                    problems.append(f"{channel}, place {source} to {target}: sent and awaited differ, first {first}")
    return problems


def collective_problems(grid: Grid, diaries: Mapping[int, Mapping[str, Diary]]) -> list[str]:
    """All ranks of an axis call the same collectives of the same size in the same order.

    diaries: by pipeline rank and axis; the same on all ranks of a stage.
    """
    problems = []
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for name in AXES:
        for rank in range(grid.world_size):
            ranks = grid.axis_ranks(name.removesuffix("_back"), rank)
            places = tuple(sorted({grid.dense_coordinates(member)[0] for member in ranks}))
            if (name, places) in seen:
                continue
            seen.add((name, places))
            first, *others = (diaries[place][name].entries for place in places)
            if any(other != first for other in others):
                problems.append(f"{name}: pipeline ranks {places} call different collectives: {first}, {others}")
    return problems
