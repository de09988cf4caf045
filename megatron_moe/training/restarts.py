"""A run that is started over and over and gets nowhere stops: how often it tried is kept beside its checkpoints.

before anything is built   refuse()       too many attempts without progress: no further one, on all ranks
before the first step      begin()        one attempt more
a newer checkpoint         progressed()   forget them all
the end, or asked to stop  forget()       as well: neither is a failure

An attempt that ends before its first step is none: nothing was trained, and what it met (exit codes 2, 64, 65) is for
a person to mend, who may need several tries.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_moe.checkpoint.messages import told_by_first
from megatron_moe.checkpoint.storage import Storage, make_dirs, write_file
from megatron_moe.config.checkpoint import CheckpointConfig
from megatron_moe.config.errors import NoProgressError
from megatron_moe.parallel.state import Axis

logger = logging.getLogger(__name__)

FILE = "restarts.json"


@dataclass(frozen=True)
class Attempts:
    """Those in a row of which none left a newer checkpoint."""

    attempts: int
    step: int  # finished ones when the last of them began


class Restarts:
    """Counts the attempts of one run. The first rank alone reads and writes; without --save nothing is counted.

    A file that cannot be read or written is logged only: counting never ends a run that could go on.
    """

    def __init__(self, wanted: CheckpointConfig, world: Axis, storage: Storage | None = None) -> None:
        self._limit = wanted.max_restarts_without_progress
        self._file = Path(wanted.save) / FILE if wanted.save is not None and world.is_first else None
        self._storage = storage or Storage()
        self._start: int | None = None  # where this attempt began; None when there is nothing to forget

    def refuse(self, world: Axis, device: torch.device) -> None:
        """NoProgressError on all ranks when enough attempts got nowhere. Collective."""
        problem = told_by_first(self._problem(), world, device)
        if problem:
            raise NoProgressError(problem)

    def _problem(self) -> str:
        found = self._read()
        if self._limit is None or found is None or found.attempts < self._limit:
            return ""
        return (
            f"{self._file}: the last {found.attempts} attempts, from step {found.step} on, ended without a newer "
            f"checkpoint (--max-restarts-without-progress {self._limit}). Mend what ended them, their logs tell what; "
            f"then delete this file, or raise the number."
        )

    def begin(self, step: int) -> None:
        """One attempt more. step: finished ones."""
        before = self._read()
        # further than the attempts before: one of them was lost between its checkpoint and forgetting
        failed = before.attempts if before is not None and before.step >= step else 0
        self._start = step
        self._write(Attempts(failed + 1, step))

    def progressed(self, saved: int | None) -> None:
        """The newest checkpoint that this attempt has finished is of this step."""
        if saved is not None and self._start is not None and saved > self._start:
            self.forget()

    def forget(self) -> None:
        """The next attempt is the first."""
        self._start = None
        if self._file is None or not os.path.lexists(self._file):
            return
        try:
            self._storage.unlink(self._file)
        except OSError as error:
            logger.warning("cannot remove %s: %s; delete it, or good attempts count as failed ones", self._file, error)

    def _read(self) -> Attempts | None:
        if self._file is None:
            return None
        try:
            found = json.loads(self._file.read_bytes())
            return Attempts(attempts=int(found["attempts"]), step=int(found["step"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("cannot read %s (%s): counting attempts from the first again", self._file, error)
            return None

    def _write(self, attempts: Attempts) -> None:
        if self._file is None:
            return
        spare = self._file.with_name(f"{FILE}.tmp")
        try:
            make_dirs(self._storage, self._file.parent)
            if os.path.lexists(spare):
                self._storage.unlink(spare)
            write_file(self._storage, spare, memoryview(json.dumps(asdict(attempts)).encode() + b"\n"))
            self._storage.rename(spare, self._file)
            self._storage.sync_dir(self._file.parent)
        except OSError as error:
            logger.warning("cannot write %s: %s; this attempt is not counted", self._file, error)
