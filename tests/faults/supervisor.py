"""Runs a job on forked ranks over and over, as torchrun does: the end of any rank ends the attempt of all."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from megatron_moe.config.errors import MegatronMoEError
from megatron_moe.parallel.peers import as_peer_error

FINISHED, PREEMPTED, PEER_DIED = 0, 75, 86
# all ranks agreed on these: each is let come to its end
AGREED = (FINISHED, PREEMPTED)
STOPPED_S = 1.0  # a rank that is stopped for so long does not come back
POLL_S = 0.05


@dataclass(frozen=True)
class Ended:
    """One attempt. codes: of each rank, as shells do not say it: -9 for a rank that was killed."""

    codes: list[int]
    noticed: float  # when the first rank's end, or standstill, was seen; seconds on this machine's clock
    hung: list[int]  # ranks that stood still

    @property
    def code(self) -> int:
        """The cause: that of a rank that did not only lose another, nor was ended because of another."""
        own = [code for code in self.codes if code not in (PEER_DIED, FINISHED)]
        return next((code for code in own if code > 0), own[0] if own else max(self.codes))


class Attempt:
    """Ranks that work(rank, world_size, *arguments) -> exit code, joined by gloo; what they print goes to `log`."""

    def __init__(self, world_size: int, log: Path, work: Callable[..., int], *arguments: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=_rank, args=(rank, world_size, store, log, work, arguments), daemon=True)
            for rank in range(world_size)
        ]
        with warnings.catch_warnings():
            # Python 3.12 warns of forking beside threads; the children use none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            for process in self.processes:
                process.start()

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """A signal to one rank, or to all; those that have ended do not mind."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    def wait(self, timeout_s: float) -> Ended | None:
        """Until the attempt is over, or None after so long; then call it again."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout=POLL_S)
            ended = [process.exitcode for process in self.processes if process.exitcode is not None]
            hung = self._standing_still() if len(ended) < len(self.processes) else []
            if ended or hung:
                return self._end(hung, gently=all(code in AGREED for code in ended) and not hung)
        return None

    def end(self) -> None:
        """Whatever they are at."""
        self._end([], gently=False)

    def _end(self, hung: list[int], gently: bool) -> Ended:
        noticed = time.monotonic()
        for process in self.processes if gently else []:
            process.join(timeout=120)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
            process.join()
        told = [process.exitcode if code is None else code for process, code in zip(self.processes, codes, strict=True)]
        for process in self.processes:
            process.close()
        self.processes = []
        self._folder.cleanup()
        return Ended([code or 0 for code in told], noticed, hung)

    def _standing_still(self) -> list[int]:
        """Ranks that a signal has stopped, and that stay so."""
        until = time.monotonic() + STOPPED_S
        found = [rank for rank, process in enumerate(self.processes) if is_stopped(process.pid)]
        while found and time.monotonic() < until:
            time.sleep(POLL_S)
            found = [rank for rank in found if is_stopped(self.processes[rank].pid)]
        return found


def is_stopped(process: int | None) -> bool:
    """Whether a process is stopped by a signal (Linux)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _rank(
    rank: int, world_size: int, store: Path, log: Path, work: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    told = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(told, stream)
    sys.stderr = open(2, "w", closefd=False, buffering=1)
    os._exit(_code(rank, world_size, store, work, arguments))


def _code(rank: int, world_size: int, store: Path, work: Callable[..., int], arguments: tuple[Any, ...]) -> int:
    torch.set_num_threads(1)
    try:
        files = FileStore(str(store), world_size)
        dist.init_process_group(
            "gloo", store=files, rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
        )
        code = work(rank, world_size, *arguments)
        dist.barrier()  # a peer may still be connecting to this rank
        return code
    except MegatronMoEError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        lost = as_peer_error(error, rank)
        print(lost or traceback.format_exc(), file=sys.stderr)
        return PEER_DIED if lost else 1
    except BaseException:
        traceback.print_exc()
        return 1
