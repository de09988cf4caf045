"""Who am I among the ranks: a value, passed to whoever needs it; never a global."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta

import torch.distributed as dist

from megatron_moe.parallel.checking import Channel, Checking
from megatron_moe.parallel.communicator import Communicator, Identity, Torch
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.recording import Recording, Tally
from megatron_moe.parallel.through_host import ThroughHost


@dataclass(frozen=True)
class Axis:
    """The ranks that I talk to along one direction."""

    name: str
    size: int
    rank: int  # my place among them
    ranks: tuple[int, ...]  # their numbers in the world
    comm: Communicator

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


Groups = dict[Channel, dist.ProcessGroup]
MakeCommunicator = Callable[[str, tuple[int, ...], int], Communicator]


@dataclass(frozen=True)
class ParallelState:
    """Two views of the same ranks, cut from one grid (see grid.py), and the axes made of them."""

    tp: Axis
    cp: Axis
    dp: Axis
    pp: Axis
    pp_back: Axis  # as pp, but its own channel: gradients must not queue behind activations
    pp_wrap: Axis  # from the pipeline's last rank on to its first, where ranks have several stages
    pp_wrap_back: Axis
    ep: Axis
    ep_node: Axis  # one rank of ep in each node; only myself where ep is not cut into nodes
    ep_local: Axis  # the ranks of ep in my node: all of them where ep is not cut
    etp: Axis
    edp: Axis
    dp_cp: Axis
    tp_cp: Axis
    stage: Axis  # dp · cp · tp: all ranks of my pipeline stage
    embedding: Axis  # the stages that hold a copy of tied embeddings
    world: Axis

    @property
    def rank(self) -> int:
        return self.world.rank

    def axis(self, name: str) -> Axis:
        found: Axis = getattr(self, name)
        return found

    @classmethod
    def build(cls, grid: Grid, rank: int, make: MakeCommunicator) -> "ParallelState":
        """Cut the axes of `rank` out of the grid; `make(name, ranks, my place)` supplies each communicator."""
        axes = {}
        for field in fields(cls):
            ranks = grid.axis_ranks(field.name.removesuffix("_back"), rank)
            place = ranks.index(rank)
            comm = make(field.name, ranks, place) if len(ranks) > 1 else Identity()
            axes[field.name] = Axis(field.name, len(ranks), place, ranks, comm)
        return cls(**axes)

    @classmethod
    def alone(cls) -> "ParallelState":
        """A world of one rank: needs no process group."""
        return cls.build(Grid(1), 0, lambda name, ranks, place: Identity())

    @classmethod
    def recorded(cls, grid: Grid, rank: int) -> tuple["ParallelState", dict[str, Tally]]:
        """Any rank of any world in this process, for meta tensors; also returns what each axis would send."""
        tallies = {field.name: Tally() for field in fields(cls)}
        state = cls.build(grid, rank, lambda name, ranks, place: Recording(len(ranks), place, tallies[name]))
        return state, tallies

    @classmethod
    def distributed(
        cls,
        grid: Grid,
        *,
        through_host: bool = False,
        known: Groups | None = None,
        checks: timedelta | None = None,
    ) -> "ParallelState":
        """This rank's state in the world that torch.distributed has joined. Collective over the world.

        through_host: what is on a GPU is copied to the host and sent from there, for ranks that share a card over gloo.
        known: groups of other grids of this world, used again; new ones are added.
        checks: before each collective the ranks compare what they are about to do, and wait so long for each other.
        """
        rank = dist.get_rank()
        groups: Groups = {} if known is None else known
        checking = Checking.begin(rank, checks) if checks is not None else None
        for field in fields(cls):
            # every rank makes every group, in the same order, as torch.distributed demands
            for member in range(grid.world_size):
                ranks = grid.axis_ranks(field.name.removesuffix("_back"), member)
                key = _channel(field.name, ranks)
                if len(ranks) > 1 and key not in groups:
                    groups[key] = dist.new_group(list(ranks))
                if len(ranks) > 1 and checking is not None:
                    checking.open(key)

        def make(name: str, ranks: tuple[int, ...], place: int) -> Communicator:
            key = _channel(name, ranks)
            found: Communicator = Torch(groups[key], ranks, place)
            found = ThroughHost(found) if through_host else found
            return found if checking is None else checking.around(found, key, name, place)

        return cls.build(grid, rank, make)


def _channel(name: str, ranks: tuple[int, ...]) -> Channel:
    """Axes over the same ranks share one process group, with two exceptions.

    The pipeline's: two ranks must never send both ways on one of them, where each may be waiting for the other; in a
    ring of three or more nobody does.   Those of replicas: what the layers send must not queue behind gradients.
    """
    if name in ("dp_cp", "edp"):
        return ("replicas", ranks)
    wrap = "wrap" if name.startswith("pp_wrap") and len(ranks) == 2 else ""
    back = "back" if name.endswith("_back") else ""
    return (wrap + back, ranks)
