"""What a checkpoint directory holds, for people: each step, whether it is whole, how it was saved, what lies about."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.inspection import inspect_checkpoint
from megatron_moe.checkpoint.load import CheckpointReader, find_checkpoint
from megatron_moe.checkpoint.rotate import LATEST, step_folder, step_of, stored_steps
from megatron_moe.checkpoint.verify import Check, look
from megatron_moe.config.errors import CheckpointError, NoCheckpointError
from megatron_moe.parallel.state import ParallelState

# the words of a layout and the options in config.json that say them
_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
}


@dataclass(frozen=True)
class Entry:
    """One step of a directory. problem: "" when it is whole, as far as was looked."""

    step: int
    num_bytes: int
    age_seconds: float
    run_id: str
    layout: str
    problem: str


def catalogue(root: Path, check: Check) -> list[Entry]:
    """All steps, newest first. check: "sizes" reads no tensor. Raises NoCheckpointError for what is no directory."""
    if not root.is_dir():
        raise NoCheckpointError(f"{root} is no directory; name one that was given to --save.")
    return [_entry(step_folder(root, step), step, check) for step in stored_steps(root)]


def _entry(folder: Path, step: int, check: Check) -> Entry:
    run_id, layout, problem = "", "unknown", ""
    try:
        manifest, papers = look(folder, step)
        run_id, layout = manifest.run_id, _layout(manifest.layout, papers.texts["config.json"])
        if check != "sizes":
            problem = "; ".join(inspect_checkpoint(folder, step, check).problems)
    except CheckpointError as error:
        problem = str(error)
    return Entry(step, size_on_disk(folder), max(0.0, time.time() - last_change(folder)), run_id, layout, problem)


def _layout(told: dict[str, Any], config_json: str) -> str:
    """As "4 ranks, TP 2 x EP 2"; sizes of 1 are left out, and what config.json does not say."""
    size = told.get("world_size", "?")
    ranks = "1 rank" if size == 1 else f"{size} ranks"
    try:
        parallel = json.loads(config_json)["parallel"]
        sizes = [f"{word} {parallel[name]}" for word, name in _SIZES.items() if parallel.get(name, 1) != 1]
    except (ValueError, KeyError, TypeError, AttributeError):
        sizes = []
    return f"{ranks}, {' x '.join(sizes)}" if sizes else ranks


def _files(path: Path) -> list[os.stat_result]:
    """The states of a folder and of the files in it; links are not followed."""
    try:
        inside = [entry.stat(follow_symlinks=False) for entry in os.scandir(path)] if path.is_dir() else []
        return [os.lstat(path), *inside]
    except OSError:
        return []


def size_on_disk(path: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(found.st_size for found in _files(path)[1:])


def last_change(path: Path) -> float:
    """When a folder or a file in it was written to last, in seconds since 1970."""
    return max((found.st_mtime for found in _files(path)), default=0.0)


@dataclass(frozen=True)
class Place:
    """A checkpoint directory and one step of it, or its newest whole one (None)."""

    root: Path
    step: int | None

    @classmethod
    def of(cls, path: Path) -> "Place":
        """From a directory, or from the folder of a step in it, or from its link `latest`."""
        if path.name == LATEST and path.is_symlink():
            path = path.parent / path.readlink()
        step = step_of(path.name)
        return cls(path, None) if step is None else cls(path.parent, step)


def open_place(path: Path) -> CheckpointReader:
    """The step in a folder, or the newest whole one in a directory, with all hashes looked at, on this process alone.

    Raises NoCheckpointError or CheckpointError.
    """
    place = Place.of(path)
    return find_checkpoint(place.root, place.step, ParallelState.alone().world)
