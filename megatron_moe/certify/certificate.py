"""One model on every layout, each beside one process: the rows of a certificate."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_moe.certify.layouts import ETP, LAYOUTS, TP, Layout
from megatron_moe.certify.spread import run_ways, tolerances, ways
from megatron_moe.certify.tiny_model import GLOBAL_BATCH, tiny_config
from megatron_moe.certify.tiny_run import CPU, TOLERANCE, Outcome, Where, outcome_of, run_all, worst_difference
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.world import check_world
from megatron_moe.parallel.launch import fork_ranks
from megatron_moe.training.validate import validate

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """How far one layout is from one process; refused: why it cannot run there, and then there are no errors."""

    layout: str
    errors: Mapping[str, float]
    refused: str | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)  # of the kinds of errors; else TOLERANCE
    seconds: float = 0.0

    @property
    def max_relative_error(self) -> float | None:
        return max(self.errors.values()) if self.errors else None

    @property
    def equal(self) -> bool:
        """Whether the layout keeps the promise; one that cannot run breaks none."""
        if self.refused is not None:
            return True
        return all(error < self.tolerances.get(kind, TOLERANCE) for kind, error in self.errors.items())


@dataclass(frozen=True)
class Subject:
    """What is certified: fields of [moe], [model] and [encoder_moe] beside the tiny model's own."""

    moe: Fields
    model: Fields = field(default_factory=dict)
    encoder_moe: Fields | None = None
    dtype: str = "fp64"

    @property
    def group_samples(self) -> int:
        """Samples that both stacks' routing groups fit into."""
        sizes = (int(moe.get("routing_group_samples", 1)) for moe in (self.moe, self.encoder_moe or {}))
        return math.lcm(*sizes)

    def config(self, parallel: Fields, micro_batch_size: int) -> RunConfig:
        micro = max(micro_batch_size, self.group_samples)
        return tiny_config(self.moe, parallel, self.model, micro, dtype=self.dtype, encoder_moe=self.encoder_moe)


def certify(
    subject: Subject, chosen: Mapping[str, Layout] = LAYOUTS, *, max_ranks: int = 8, where: Where = CPU
) -> list[Row]:
    """Three steps of a tiny model on every layout of so many ranks, forked on this machine, each beside one process.

    In float64 a layout has to be within TOLERANCE, in a narrower type within what spread.py measures.
    Raises ConfigError when it cannot run at all.
    """
    group = subject.group_samples
    first = subject.config({}, 1)
    validate(first)
    wanted, allowed = _wanted(subject, first, where)
    rows: dict[str, Row] = {}
    runnable: dict[str, RunConfig] = {}
    for name, layout in chosen.items():
        if layout.ranks > max_ranks or layout.samples_of_a_rank(GLOBAL_BATCH) < max(group, layout.micro_batch_size):
            continue
        try:
            runnable[name] = _config(subject, layout)
        except ConfigError as error:
            rows[name] = Row(name, {}, refused=str(error))
    for ranks in sorted({layout.ranks for layout in chosen.values()}):
        names = [name for name in runnable if chosen[name].ranks == ranks]
        if names:
            answers = _fork(ranks, where, run_all, [runnable[name] for name in names], where)
            for number, name in enumerate(names):
                found = [rank[number] for rank in answers]
                errors = worst_difference(outcome_of(found), wanted)
                rows[name] = Row(name, errors, tolerances=allowed, seconds=found[0].seconds)
    return [rows[name] for name in chosen if name in rows]


def _wanted(subject: Subject, config: RunConfig, where: Where) -> tuple[Outcome, dict[str, float]]:
    """What one process finds, and how far from it a layout may be; in a process of its own, for it may use a GPU."""
    group = subject.group_samples
    chosen = ways(group) if subject.dtype != "fp64" else ways(group)[:1]
    found = [outcome_of([one]) for one in _fork(1, where, run_ways, config, chosen, where)[0]]
    allowed = tolerances(found, subject.dtype) if subject.dtype != "fp64" else {}
    return found[0], allowed


KINDS = ("loss", "auxiliary losses", "gradient norm", "gradients", "weights")


def check_where(where: Where, max_ranks: int) -> int:
    """The most ranks that may run there. Raises ConfigError, which says what would be possible."""
    if where.device == "cpu":
        if where.backend != "gloo":
            raise ConfigError(f"--backend {where.backend} --device cpu: it moves what is on GPUs; use --backend gloo.")
        return max_ranks
    cards = int(_fork(1, CPU, _cards)[0])
    if not cards:
        raise ConfigError("--device cuda: PyTorch finds no GPU here; use --device cpu.")
    if where.backend == "nccl" and max_ranks > cards:
        raise ConfigError(
            f"--backend nccl wants a card for each rank, and of {max_ranks} ranks only {cards} would have one; give "
            f"--max-ranks {cards}, or --backend gloo, over which ranks may share a card."
        )
    return max_ranks


def _cards(rank: int, world_size: int) -> int:
    """Asked in a process of its own: after the question, this one could not fork any more."""
    return torch.cuda.device_count()


def _config(subject: Subject, layout: Layout) -> RunConfig:
    sizes = subject.config({}, 1).model
    parallel = layout.fields_for(sizes.encoder_num_layers, sizes.num_layers)
    try:
        return _checked(subject.config(parallel, layout.micro_batch_size), layout.ranks)
    except ConfigError:
        if ETP in layout.parallel or TP not in layout.parallel:
            raise
    # expert tensor parallelism follows the tensor size unless it is given: some methods want it given as 1
    return _checked(subject.config({**parallel, ETP: 1}, layout.micro_batch_size), layout.ranks)


def _checked(config: RunConfig, ranks: int) -> RunConfig:
    check_world(config, ranks)
    validate(config)
    return config


def _fork(ranks: int, where: Where, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; the children use none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        return fork_ranks(ranks, work, *arguments, timeout_s=3600.0, backend=where.backend)
