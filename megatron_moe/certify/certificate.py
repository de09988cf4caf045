"""One model on every layout, each beside one process: the rows of a certificate."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.certify.layouts import ETP, LAYOUTS, TP, Layout
from megatron_moe.certify.tiny_model import GLOBAL_BATCH, tiny_config
from megatron_moe.certify.tiny_run import TOLERANCE, alone, outcome_of, run_all, worst_difference
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

    @property
    def max_relative_error(self) -> float | None:
        return max(self.errors.values()) if self.errors else None

    @property
    def equal(self) -> bool:
        """Whether the layout keeps the promise; one that cannot run breaks none."""
        return self.refused is not None or max(self.errors.values()) < TOLERANCE


@dataclass(frozen=True)
class Subject:
    """What is certified: fields of [moe], [model] and [encoder_moe] beside the tiny model's own."""

    moe: Fields
    model: Fields = field(default_factory=dict)
    encoder_moe: Fields | None = None

    @property
    def group_samples(self) -> int:
        """Samples that both stacks' routing groups fit into."""
        sizes = (int(moe.get("routing_group_samples", 1)) for moe in (self.moe, self.encoder_moe or {}))
        return math.lcm(*sizes)

    def config(self, parallel: Fields, micro_batch_size: int) -> RunConfig:
        return tiny_config(
            self.moe, parallel, self.model, max(micro_batch_size, self.group_samples), encoder_moe=self.encoder_moe
        )


def certify(subject: Subject, *, max_ranks: int = 8) -> list[Row]:
    """Three steps of a tiny model in float64 on every layout of so many ranks, forked on this machine over gloo.

    Raises ConfigError when it cannot run at all.
    """
    group = subject.group_samples
    first = subject.config({}, 1)
    validate(first)
    wanted = alone(first)
    rows: dict[str, Row] = {}
    runnable: dict[str, RunConfig] = {}
    for name, layout in LAYOUTS.items():
        if layout.ranks > max_ranks or layout.samples_of_a_rank(GLOBAL_BATCH) < group:
            continue
        try:
            runnable[name] = _config(subject, layout)
        except ConfigError as error:
            rows[name] = Row(name, {}, refused=str(error))
    for ranks in sorted({layout.ranks for layout in LAYOUTS.values()}):
        names = [name for name in runnable if LAYOUTS[name].ranks == ranks]
        if names:
            answers = _fork(ranks, [runnable[name] for name in names])
            for number, name in enumerate(names):
                rows[name] = Row(name, worst_difference(outcome_of([rank[number] for rank in answers]), wanted))
    return [rows[name] for name in LAYOUTS if name in rows]


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


def _fork(ranks: int, configs: Sequence[RunConfig]) -> list[Any]:
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; the children use none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        return fork_ranks(ranks, run_all, configs)
