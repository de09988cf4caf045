"""Where each rank stands: two views of the same ranks, cut from one grid by arithmetic alone.

dense:   rank = ((pp · DP + dp) · CP + cp) · TP + tp
expert:  rank = ((pp · EDP + edp) · EP + ep) · ETP + etp        with DP·CP·TP = EDP·EP·ETP

So tp (or etp) varies fastest, and expert parallelism is folded over the dense axes. On several nodes ep has two halves:
ep = ep_node · EP_LOCAL + ep_local, so that one node's part of ep and etp is a run of EP_LOCAL·ETP consecutive ranks.
"""

from dataclasses import dataclass

from megatron_moe.config.errors import ConfigError


@dataclass(frozen=True)
class Grid:
    """Sizes of all axes of one world; says which ranks share an axis with a rank.

    embedding_places: pipeline ranks that hold a copy of the one embedding; none = the two ends.
    ep_ranks_per_node: ranks of ep that stand in one node; none = all of them.
    rounds: pipeline stages of each rank; from 2 on the last rank hands on to the first.

    Raises ConfigError when the sizes do not multiply to the world.
    """

    world_size: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    embedding_places: tuple[int, ...] | None = None
    ep_ranks_per_node: int | None = None
    rounds: int = 1

    def __post_init__(self) -> None:
        dense = self.tp * self.cp * self.pp
        if self.world_size % dense:
            raise ConfigError(
                f"{self.world_size} ranks cannot be split over tensor {self.tp} x context {self.cp} x pipeline "
                f"{self.pp}; use a multiple of {dense} ranks."
            )
        expert = self.ep * self.etp
        if self.stage_size % expert:
            raise ConfigError(
                f"{self.stage_size} ranks of a pipeline stage cannot be split over --expert-model-parallel-size "
                f"{self.ep} x --expert-tensor-parallel-size {self.etp}; use a product that divides {self.stage_size}."
            )
        if self.ep % self.ep_local:
            raise ConfigError(
                f"--expert-model-parallel-size {self.ep} cannot be split over --expert-model-parallel-ranks-per-node "
                f"{self.ep_local}; use a number that divides {self.ep}."
            )

    @property
    def stage_size(self) -> int:
        """Ranks that share one pipeline stage."""
        return self.world_size // self.pp

    @property
    def dp(self) -> int:
        return self.stage_size // (self.tp * self.cp)

    @property
    def edp(self) -> int:
        return self.stage_size // (self.ep * self.etp)

    @property
    def ep_local(self) -> int:
        """Ranks of ep inside one node."""
        return self.ep if self.ep_ranks_per_node is None else self.ep_ranks_per_node

    @property
    def ep_node(self) -> int:
        """Nodes that share the experts."""
        return self.ep // self.ep_local

    def dense_coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(pp, dp, cp, tp) of a rank."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return pp, dp, cp, tp

    def expert_coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(pp, edp, ep, etp) of a rank."""
        rest, etp = divmod(rank, self.etp)
        rest, ep = divmod(rest, self.ep)
        pp, edp = divmod(rest, self.edp)
        return pp, edp, ep, etp

    def axis_ranks(self, name: str, rank: int) -> tuple[int, ...]:
        """The ranks, in order, that share the axis `name` with `rank` (itself included)."""
        found: tuple[int, ...] = AXIS_RANKS[name](self, rank)
        return found

    def _dense(self, rank: int, *free: str) -> tuple[int, ...]:
        mine = dict(zip(("pp", "dp", "cp", "tp"), self.dense_coordinates(rank), strict=True))
        spans = [range(getattr(self, axis)) if axis in free else (at,) for axis, at in mine.items()]
        return tuple(
            ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp
            for pp in spans[0]
            for dp in spans[1]
            for cp in spans[2]
            for tp in spans[3]
        )

    def _expert(self, rank: int, free: str) -> tuple[int, ...]:
        mine = dict(zip(("pp", "edp", "ep", "etp"), self.expert_coordinates(rank), strict=True))
        spans = [range(getattr(self, axis)) if axis == free else (at,) for axis, at in mine.items()]
        return tuple(
            ((pp * self.edp + edp) * self.ep + ep) * self.etp + etp
            for pp in spans[0]
            for edp in spans[1]
            for ep in spans[2]
            for etp in spans[3]
        )

    def _ep_node(self, rank: int) -> tuple[int, ...]:
        """Those with the same place in their nodes."""
        _, _, ep, _ = self.expert_coordinates(rank)
        return self._expert(rank, "ep")[ep % self.ep_local :: self.ep_local]

    def _ep_local(self, rank: int) -> tuple[int, ...]:
        """Those of the own node."""
        _, _, ep, _ = self.expert_coordinates(rank)
        first = ep - ep % self.ep_local
        return self._expert(rank, "ep")[first : first + self.ep_local]

    def _embedding(self, rank: int) -> tuple[int, ...]:
        stages = self._dense(rank, "pp")
        places = (0, self.pp - 1) if self.embedding_places is None else self.embedding_places
        holders = tuple(stages[place] for place in sorted(set(places)))
        return holders if rank in holders else (rank,)


AXIS_RANKS = {
    "tp": lambda grid, rank: grid._dense(rank, "tp"),
    "cp": lambda grid, rank: grid._dense(rank, "cp"),
    "dp": lambda grid, rank: grid._dense(rank, "dp"),
    "pp": lambda grid, rank: grid._dense(rank, "pp"),
    # from the last rank of the pipeline to the first: nobody goes there while each has one stage
    "pp_wrap": lambda grid, rank: grid._dense(rank, "pp") if grid.rounds > 1 else (rank,),
    "dp_cp": lambda grid, rank: grid._dense(rank, "dp", "cp"),
    "tp_cp": lambda grid, rank: grid._dense(rank, "cp", "tp"),
    "stage": lambda grid, rank: grid._dense(rank, "dp", "cp", "tp"),
    "ep": lambda grid, rank: grid._expert(rank, "ep"),
    "ep_node": lambda grid, rank: grid._ep_node(rank),
    "ep_local": lambda grid, rank: grid._ep_local(rank),
    "etp": lambda grid, rank: grid._expert(rank, "etp"),
    "edp": lambda grid, rank: grid._expert(rank, "edp"),
    # the stages that hold a copy of tied embeddings
    "embedding": lambda grid, rank: grid._embedding(rank),
    "world": lambda grid, rank: tuple(range(grid.world_size)),
}
