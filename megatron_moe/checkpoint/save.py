"""Saving: a snapshot now, the writing beside the training, and the commit at a step boundary, on all ranks together.

save()              first rank makes step_XXXXXXXX.tmp-<run>-<attempt>; every rank copies its blocks to host memory
(a thread)          every rank writes and syncs its files
commit_if_ready()   tables go to the first rank, which checks them, writes MANIFEST.json and renames the folder
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.commit import assemble, commit, twin_experts
from megatron_moe.checkpoint.host_memory import HostMemory
from megatron_moe.checkpoint.load import examine
from megatron_moe.checkpoint.manifest import PART_NAME, RUN_ID
from megatron_moe.checkpoint.messages import all_ready, gather_to_first, told_by_first
from megatron_moe.checkpoint.rotate import (
    REMOVED,
    Rotation,
    discard,
    left_overs,
    point_latest,
    step_folder,
    stored_steps,
    sweep,
)
from megatron_moe.checkpoint.snapshot import prepare_memory, take_snapshot
from megatron_moe.checkpoint.storage import Storage, describe_failure, make_dirs
from megatron_moe.checkpoint.stream import code_version
from megatron_moe.checkpoint.write import RankTable, Share, write_share
from megatron_moe.config.errors import CheckpointError, ConfigError, MegatronMoEError, ReplicaError, StorageError
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.state import Axis

logger = logging.getLogger(__name__)

_HEAD_START_S = 0.002


class _Job:
    """Work beside this thread, or at once when told so."""

    def __init__(self, work: Callable[[], None], background: bool) -> None:
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True) if background else None
        if self._thread:
            self._thread.start()
        else:
            work()

    def ready(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        if self._thread:
            self._thread.join()


@dataclass
class _InFlight:
    """A save that is not committed yet."""

    step: int
    folder: Path
    job: _Job | None = None
    table: RankTable | None = None


class CheckpointWriter:
    """Writes checkpoints of one run; all ranks of `world` make the same calls in the same order.

    A full or failing disk is logged and kept in `last_error` (StorageError), and training may go on: the last good
    checkpoint is untouched. Tensors with holes or overlaps raise CheckpointError, replicas that differ ReplicaError, on
    all ranks.
    background: write in a thread; otherwise save() returns when the checkpoint is committed.
    sha256: put that of each tensor file into the manifest too, beside the xxh3-128 of each piece.
    Between saves the writer keeps the memory of one snapshot (HostMemory), until finish().
    device: where the world's communicator wants its tensors.
    """

    def __init__(
        self,
        root: Path,
        world: Axis,
        keep: int | None,
        run_id: str,
        storage: Storage | None = None,
        background: bool = True,
        sha256: bool = False,
        device: torch.device | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ConfigError(f"keep={keep} checkpoints cannot be: use 1 or more, or leave it out to keep all")
        if not RUN_ID.fullmatch(run_id):
            raise ConfigError(f"run id {run_id[:80]!r} must be 1 to 64 letters, digits, '-' or '_', the first no sign")
        self._root = root
        self._world = world
        self._run_id = run_id
        self._storage = storage or Storage()
        self._background = background
        self._sha256 = sha256
        self._device = device or torch.device("cpu")
        self._rotation = Rotation(self._storage, root, keep)
        self._memory = HostMemory()
        self._ours = re.compile(rf".+\.tmp-{re.escape(run_id)}(-\d+(-replaced)?)?")
        self._attempt = 0
        self._in_flight: _InFlight | None = None
        self._sweeper: _Job | None = None
        self._preparation: _Job | None = None
        self.last_error: MegatronMoEError | None = None
        self.last_step: int | None = None
        if world.is_first:
            sweep(self._storage, root)

    def prepare(self, parts: Mapping[str, Sequence[Block]]) -> None:
        """Get the memory that `save` of these blocks needs, beside the first steps; else the first save waits for it.

        Not collective.
        """

        def work() -> None:
            # without memory the save itself will tell
            with suppress(MemoryError, RuntimeError):
                prepare_memory(parts, self._memory)

        self._preparation = _Job(work, background=True)

    def save(
        self,
        step: int,
        parts: Mapping[str, Sequence[Block]],
        state: Mapping[str, Any],
        config_json: str,
        data: Mapping[str, Any],
    ) -> None:
        """Begin to save this step; the blocks may change as soon as it returns. Collective.

        parts: "model", "optim", ... each becomes a file for each rank. state and data: what json can hold, the same on
        all ranks. Waits for a save that is still in flight. A step that is already there, valid, is left alone.
        """
        wrong = [part for part in parts if not PART_NAME.fullmatch(part)]
        if wrong or step < 0:
            raise ValueError(f"cannot save step {step} with parts {list(parts)}")
        # every rank makes them: what json refuses, it refuses on all ranks alike
        texts = {
            "state.json": json.dumps(state, indent=1).encode(),
            "config.json": config_json.encode(),
            "data.json": json.dumps(data, indent=1).encode(),
        }
        self.commit_if_ready(block=True)
        self._wait_for_sweeper()
        own = sum(block.tensor.nbytes for blocks in parts.values() for block in blocks if block.primary)
        folder = self._begin(step, need=own + sum(map(len, texts.values())))
        if folder is None:
            return
        flight = self._in_flight = _InFlight(step, folder)
        metadata = {"run_id": self._run_id, "step": str(step), "rank": str(self._world.rank)}
        if self._preparation:
            self._preparation.wait()
            self._preparation = None
        try:
            snapshot = take_snapshot(parts, self._memory)
        except (MemoryError, RuntimeError) as error:
            flight.table = RankTable(problem=f"no copy in host memory: {str(error) or 'out of memory'}", storage=True)
        else:
            mine = texts if self._world.is_first else {}
            share = Share(folder, self._world.rank, snapshot, mine, metadata, self._sha256)

            def write() -> None:
                if self._background:
                    # the step goes on first: both threads want the interpreter
                    time.sleep(_HEAD_START_S)
                flight.table = write_share(self._storage, share)

            flight.job = _Job(write, self._background)
        if not self._background:
            self.commit_if_ready(block=True)

    def commit_if_ready(self, block: bool = False) -> int | None:
        """Make the save in flight final once all ranks have written; returns its step then. Collective.

        block: wait for it. Call this at every step boundary; without a save in flight it costs nothing.
        """
        flight = self._in_flight
        if flight is None:
            return None
        if block:
            if flight.job:
                flight.job.wait()
        elif not all_ready(flight.job is None or flight.job.ready(), self._world, self._device):
            return None
        self._in_flight = None
        table = flight.table or RankTable(problem="the writing thread died")
        # what the first rank tells itself need not be put into words
        told = gather_to_first("" if self._world.is_first else table.to_text(), self._world, self._device)
        answer = self._commit(flight, table, told[1:]) if self._world.is_first else {}
        return self._conclude(flight, json.loads(told_by_first(json.dumps(answer), self._world, self._device)))

    def finish(self) -> None:
        """Commit what is in flight and end all background work. Collective."""
        try:
            self.commit_if_ready(block=True)
        finally:
            if self._preparation:
                self._preparation.wait()
            self._memory.release()
            self._wait_for_sweeper()

    def go_back(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run goes on after `step`, and comes to them anew. Collective.

        Waits for a save in flight.  Raises StorageError on all ranks when one stays.
        """
        self.finish()
        problem = ""
        if self._world.is_first:
            later = [found for found in stored_steps(self._root) if found > step]
            # the newest first: a kill in between leaves what the run came from
            left = [found for found in later if not self._rotation.forget(found)]
            if left:
                problem = f"{step_folder(self._root, left[0])} cannot be removed, and the run went back to step {step}"
        problem = told_by_first(problem, self._world, self._device)
        if problem:
            raise StorageError(f"{problem}. Remove it, and start again.")
        self.last_step = step

    def _wait_for_sweeper(self) -> None:
        if self._sweeper:
            self._sweeper.wait()
            self._sweeper = None

    def _begin(self, step: int, need: int) -> Path | None:
        """The new folder on all ranks; None when there is nothing to write, or nowhere to.  need: bytes, to tell."""
        final = step_folder(self._root, step)
        there = told_by_first("there" if os.path.lexists(final) else "", self._world, self._device)
        if there and self._is_saved(step):
            return None
        mine = self._new_folder(step, need) if self._world.is_first else {}
        answer: dict[str, str] = json.loads(told_by_first(json.dumps(mine), self._world, self._device))
        if "problem" in answer:
            self._fail(StorageError(f"step {step} was not saved: {answer['problem']}"))
            return None
        return self._root / answer["name"]

    def _is_saved(self, step: int) -> bool:
        found = examine(step_folder(self._root, step), step, self._world, self._device, "xxh3")
        if isinstance(found, str):
            self._log(logging.WARNING, "step %d was saved before, but broken, and is replaced: %s", step, found)
            return False
        whose = "this run" if found.manifest.run_id == self._run_id else f"run {found.manifest.run_id}"
        self._log(logging.WARNING, "step %d in %s, by %s, is valid already; left as it is", step, self._root, whose)
        return True

    def _new_folder(self, step: int, need: int) -> dict[str, str]:
        folder = self._root
        try:
            make_dirs(self._storage, self._root)
            while True:
                self._attempt += 1
                folder = self._root / f"{step_folder(self._root, step).name}.tmp-{self._run_id}-{self._attempt}"
                if not os.path.lexists(folder):
                    break
            self._storage.make_dir(folder)
            return {"name": folder.name}
        except OSError as error:
            return {"problem": describe_failure(error, folder, need)}

    def _commit(self, flight: _InFlight, own: RankTable, texts: Sequence[str]) -> dict[str, str]:
        """What became of it, to be told to all ranks; never raises an Exception, for the others wait."""
        need = 0
        try:
            tables = [own, *(RankTable.from_text(text) for text in texts)]
            need = sum(file.size for table in tables for file in table.files.values())
            manifest = assemble(tables, self._run_id, flight.step, code_version())
            commit(self._storage, manifest, flight.folder, step_folder(self._root, flight.step))
        except OSError as error:
            return {"storage": describe_failure(error, flight.folder, need)}
        except StorageError as error:
            return {"storage": str(error)}
        except ReplicaError as error:
            return {"replicas": str(error)}
        except Exception as error:
            return {"check": str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"}
        for twin, first in twin_experts(manifest.parts.get("model", {}))[:5]:
            logger.warning("step %d: experts %s and %s hold the same numbers", flight.step, first, twin)
        return {}

    def _conclude(self, flight: _InFlight, answer: dict[str, str]) -> int | None:
        self._clean_up(flight, committed=not answer)
        if not answer:
            self.last_error, self.last_step = None, flight.step
            self._log(logging.INFO, "saved step %d in %s", flight.step, self._root)
            return flight.step
        told = f"step {flight.step} was not saved: {next(iter(answer.values()))}"
        if "storage" not in answer:
            kept = f"\nThe last good checkpoint: {self._kept()}."
            self.last_error = CheckpointError(told) if "check" in answer else ReplicaError(told + kept)
            raise self.last_error
        self._fail(StorageError(told))
        return None

    def _clean_up(self, flight: _InFlight, committed: bool) -> None:
        """On the first rank: link, rotation, removal of what failed or was replaced. Slow on large folders: beside."""
        if not self._world.is_first:
            return

        def work() -> None:
            if committed:
                point_latest(self._storage, self._root, flight.step, self._run_id)
                self._rotation.remove_old(flight.step)
            # a full disk stays full if what failed stays, of this save or of one before
            for path in left_overs(self._root):
                if path.name.endswith(REMOVED) or self._ours.fullmatch(path.name):
                    discard(self._storage, path)

        self._sweeper = _Job(work, self._background)

    def _fail(self, error: StorageError) -> None:
        self.last_error = error
        text = "%s\nLast good checkpoint: %s. Free some room, or save elsewhere."
        self._log(logging.ERROR, text, error, self._kept())

    def _kept(self) -> str:
        return "none in this run yet" if self.last_step is None else f"step {self.last_step}"

    def _log(self, level: int, message: str, *values: object) -> None:
        if self._world.is_first:
            logger.log(level, message, *values)
