"""Another layout for a job that comes back on fewer ranks: the first of --fallback-layouts that fits them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.no_effect import SET_BY_SOMEBODY
from megatron_moe.config.options import settings_of
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.relations import divisors
from megatron_moe.config.sections import Sections
from megatron_moe.config.world import check_world

FLAG, ORIGIN = "--fallback-layouts", "fallback"
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
# what describes how the given layout is cut or talks, and nothing once the size is another, or 1
OF_THE_CUT = (
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "microbatch_group_size_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_schedule",
)
OF_ONE_NODE = ("expert_model_parallel_ranks_per_node", "expert_rank_capacity_factor")

Run = TypeVar("Run", bound=Sections)


def fit_world(run: Run, world_size: int) -> Run:
    """The run as it is laid out over so many ranks: as given, or as the first fallback that fits.

    Batch and order of samples stay. Raises ConfigError, as check_world does for the given layout, when none fits.
    """
    try:
        check_world(run, world_size)
    except ConfigError as error:
        for text in run.parallel.fallback_layouts:
            other = laid_out(run, text)
            if _fits(other, world_size):
                return other
        tried = f" None of {FLAG} {' '.join(run.parallel.fallback_layouts)} fits either."
        raise ConfigError(f"{error}{tried if run.parallel.fallback_layouts else ''}") from error
    return run


def check_fallbacks(run: Sections, origins: Mapping[str, str]) -> None:
    """Raise ConfigError for a fallback that cannot be read, is no layout of this run, or that no world would use."""
    found: list[Sections] = [run]
    share = run.training.global_batch_size // run.training.micro_batch_size
    for text in run.parallel.fallback_layouts:
        other = laid_out(run, text)
        worlds = [other.parallel.model_parallel_size * copies for copies in divisors(share)]
        used = any(_fits(other, world) and not any(_fits(before, world) for before in found) for world in worlds)
        if not used and origins.get("parallel.fallback_layouts") in SET_BY_SOMEBODY:
            raise ConfigError(
                f"{FLAG} {text} has no effect: no number of ranks fits it that does not fit a layout before it; "
                f"leave it out, or name smaller sizes."
            )
        found.append(other)


def laid_out(run: Run, text: str) -> Run:
    """The run with the sizes of one fallback, "tp=2,ep=4"; those that it does not name are 1.

    Raises ConfigError when it cannot be read, and when the run cannot be cut so.
    """
    changes = _changes(run.parallel, _sizes(text))
    before = run.parallel
    changed = {f"parallel.{name}": ORIGIN for name, value in changes.items() if value != getattr(before, name)}
    origins = {**getattr(run, "origins", {}), **changed}
    try:
        return replace(run, parallel=replace(before, **changes), origins=origins)  # type: ignore[call-arg]
    except ConfigError as error:
        raise ConfigError(f"{FLAG} {text}: {error}") from error


def _sizes(text: str) -> dict[str, int]:
    """{"tp": 2}, in the words of the fallback."""
    found: dict[str, int] = {}
    for word in text.split(","):
        name, _, size = word.partition("=")
        if name not in SIZES or name in found or not re.fullmatch("[1-9][0-9]{0,6}", size):
            raise ConfigError(
                f"{FLAG} {text}: {word!r} is no size; expected some of {', '.join(SIZES)}, once each, such as "
                f"tp=2,ep=4."
            )
        found[name] = int(size)
    return found


def _changes(before: ParallelConfig, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Fields that another layout changes, with what only the one before had set back to its default."""
    unset = {name: setting.default for name, setting in settings_of(ParallelConfig).items()}
    given: dict[str, Any] = {field: sizes.get(name, 1) for name, field in SIZES.items()}
    given[SIZES["etp"]] = sizes.get("etp")
    idle: list[str] = ["fallback_layouts"]
    if given[SIZES["pp"]] != before.pipeline_model_parallel_size:
        idle += OF_THE_CUT
    if given[SIZES["ep"]] != before.expert_model_parallel_size:
        idle += OF_ONE_NODE
    if given[SIZES["tp"]] == 1:
        idle += ["sequence_parallel", "tp_comm_overlap"]
    if given[SIZES["cp"]] == 1:
        idle += ["cp_comm_type"]
    return {**given, **{name: unset[name] for name in idle}}


def _fits(run: Sections, world_size: int) -> bool:
    try:
        check_world(run, world_size)
    except ConfigError:
        return False
    return True
