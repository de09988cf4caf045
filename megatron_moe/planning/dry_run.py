"""A whole world in one process: every rank's parameters, axes, transfers and memory, with no memory and no messages.

Ranks of one pipeline stage hold weights of the same shapes, so that one of them is built, on meta; where each rank
stands, what it holds and whom it talks to is worked out for every single one. What tensor parallelism makes uneven (a
sequence of 114 over 8 ranks) is worked out for every place on tp.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from megatron_moe.config.run import RunConfig
from megatron_moe.config.stages import schedule_name
from megatron_moe.config.world import check_world
from megatron_moe.models.build import gpt_spec, stage_parts
from megatron_moe.models.gpt import GPTStage
from megatron_moe.optim.bucket import wide_dtype
from megatron_moe.optim.gradients import GradientBuckets
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import layout_of
from megatron_moe.parallel.recording import Recording
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.actions import Pipeline
from megatron_moe.pipeline.schedules import SCHEDULES
from megatron_moe.pipeline.verify import check_schedule
from megatron_moe.planning.agreement import AXES, Diary, axis_problems, collective_problems, transfer_problems
from megatron_moe.planning.communication import edge_bytes, shapes_of, step_traffic
from megatron_moe.planning.coverage import Coverage, check_coverage
from megatron_moe.planning.parameters import parameters


@dataclass(frozen=True)
class StageReport:
    """Of each rank of one pipeline stage, in bytes: activations are not counted."""

    layers: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    sent: Mapping[str, int]  # in a step, by axis, the most of any place on tp

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Report:
    """What the dry run found; it went well when there are no problems."""

    grid: Grid
    coverage: Coverage
    by_formula: Mapping[str, int]  # parameters, by part
    stages: tuple[StageReport, ...]
    transfers: int  # tensors passed on in a step, of one pipeline
    problems: tuple[str, ...]


def dry_run(config: RunConfig, grid: Grid, vocab_size: int) -> Report:
    """Builds and checks. Raises ConfigError when the run cannot be laid out on that world at all."""
    check_world(config, grid.world_size)
    built = {place: _Built(config, grid, place, vocab_size) for place in range(grid.pp)}
    coverage = check_coverage({place: one.named for place, one in built.items()}, grid)
    problems = [*coverage.problems, *axis_problems(grid)]
    problems += collective_problems(grid, {place: one.diaries for place, one in built.items()})
    by_formula = parameters(config, vocab_size)
    if sum(by_formula.values()) != coverage.parameters:
        problems.append(f"{coverage.parameters} parameters were built, by formula {sum(by_formula.values())}")
    transfers, more = _transfers(config, grid, vocab_size)
    return Report(
        grid=grid,
        coverage=coverage,
        by_formula=by_formula,
        stages=tuple(one.report(_sent(config, grid, place, vocab_size)) for place, one in built.items()),
        transfers=transfers,
        problems=tuple(problems + more),
    )


def rank_at(grid: Grid, pp: int, tp: int = 0) -> int:
    """The first rank at a place of the pipeline and of tp."""
    return pp * grid.stage_size + tp


class _Built:
    """What the ranks of one place of the pipeline hold, and what they say when gradients are summed."""

    def __init__(self, config: RunConfig, grid: Grid, place: int, vocab_size: int) -> None:
        self.diaries = {name: Diary() for name in AXES}
        state = ParallelState.build(
            grid, rank_at(grid, place), lambda name, ranks, at: Recording(len(ranks), at, self.diaries[name])
        )
        parts = stage_parts(config)
        numbers = range(place, len(parts), grid.pp)
        stages = [GPTStage(gpt_spec(config, vocab_size), parts, number, state) for number in numbers]
        known: dict[str, nn.Parameter] = {}
        # what several stages of a rank have in common is one parameter
        named = [[(name, known.setdefault(name, weight)) for name, weight in s.named_parameters()] for s in stages]
        self.named = [(name, layout_of(weight)) for name, weight in known.items()]
        self._layers = ", ".join(_run(parts[number]) for number in numbers)
        self._parameters = sum(weight.numel() for weight in known.values())
        self._buckets = GradientBuckets(
            named,
            state,
            bucket_elements=config.parallel.ddp_bucket_size,
            sharded=config.parallel.shards_optimizer,
        )
        self._buckets.reduce()
        for bucket in self._buckets.buckets:
            bucket.gather_weights()

    def report(self, sent: Mapping[str, int]) -> StageReport:
        """Gradients are kept whole, masters and moments of the own shard (ZeRO-1)."""
        weights = gradients = optimizer = 0
        for bucket in self._buckets.buckets:
            wide = wide_dtype(bucket.weights.dtype).itemsize
            narrow = bucket.weights.dtype.itemsize
            weights += bucket.weights.numel() * narrow
            gradients += bucket.weights.numel() * wide
            optimizer += bucket.shard_elements * wide * (3 if narrow < wide else 2)
        return StageReport(self._layers, self._parameters, weights, gradients, optimizer, sent)


def _run(layers: range) -> str:
    return f"{layers.start}-{layers.stop - 1}" if layers else "none"


def _sent(config: RunConfig, grid: Grid, place: int, vocab_size: int) -> dict[str, int]:
    """Bytes in a step, by axis."""
    found: dict[str, int] = {}
    for tp in range(grid.tp):
        for axis, tally in step_traffic(config, grid, rank_at(grid, place, tp), vocab_size).items():
            found[axis] = max(found.get(axis, 0), tally.total_bytes)
    return found


def _transfers(config: RunConfig, grid: Grid, vocab_size: int) -> tuple[int, list[str]]:
    """Tensors that pass through one pipeline in a step, and what is wrong in any of them."""
    parts = stage_parts(config)
    microbatches = config.training.global_batch_size // (config.training.micro_batch_size * grid.dp)
    group = config.parallel.microbatch_group_size_per_virtual_pipeline_stage
    shape = Pipeline(grid.pp, microbatches, len(parts) // grid.pp, group)
    lists = SCHEDULES[schedule_name(config.model, config.parallel)](shape)
    problems = []
    try:
        check_schedule(lists, shape)
    except ValueError as error:
        problems.append(str(error))
    passed = 0
    for tp in range(grid.tp):
        edges = []
        for place in range(grid.pp):
            shapes = shapes_of(config, grid, rank_at(grid, place, tp), vocab_size)
            edges.append({stage: edge_bytes(shapes, parts[stage].start) for stage in range(1, len(parts))})
        problems += transfer_problems(lists, shape, edges)
        passed = 2 * microbatches * sum(len(tensors) for tensors in edges[0].values())
    # a pipeline is one place of tp all the way through
    for rank in range(grid.world_size):
        if len({grid.dense_coordinates(one)[1:] for one in grid.axis_ranks("pp", rank)}) > 1:
            problems.append(f"the pipeline of rank {rank} changes its place on another axis")
    return passed, problems
