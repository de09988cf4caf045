"""Watched gloo ranks, forked from the test, that do small steps for ever until trouble comes."""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.peers import as_peer_error
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.console import setup_logging
from megatron_moe.training.watch.rank import Watch, Watched
from megatron_moe.training.watch.server import Settings
from megatron_moe.training.watch.verdict import Limits

CPU = torch.device("cpu")
FOR_EVER = 3600.0  # seconds
AWAITED_S = 60.0  # of a busy machine

Trouble = Callable[[ParallelState], None]


def spin(state: ParallelState) -> None:
    until = time.monotonic() + FOR_EVER
    while time.monotonic() < until:
        pass


def hold_interpreter(state: ParallelState) -> None:
    """In C, without giving other threads a chance."""
    ctypes.PyDLL("libc.so.6").sleep(int(FOR_EVER))


def catastrophic_pattern(state: ParallelState) -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


def wait_for_loader(state: ParallelState) -> None:
    """The main thread waits for a thread that reads ahead and does not come back."""
    never = threading.Event()
    reader = threading.Thread(target=never.wait, args=(FOR_EVER,), name="loader_0", daemon=True)
    reader.start()
    reader.join()


HANGS: Mapping[str, Trouble] = {
    "stopped": lambda state: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeping": lambda state: time.sleep(FOR_EVER),
    "spinning": spin,
    "holding the interpreter": hold_interpreter,
    "in a catastrophic pattern": catastrophic_pattern,
    "waiting for its loader": wait_for_loader,
    # one barrier of the others is left out: from then on it is one collective ahead
    "skipping a barrier": lambda state: skip_barrier(state),
}


def skip_barrier(state: ParallelState) -> None:
    state.world.comm.all_gather(torch.ones(1), [1] * state.world.size)


@dataclass(frozen=True)
class Plan:
    """What the ranks do."""

    world_size: int
    culprit: int = 0
    at_step: int = 3
    trouble: Trouble | None = None
    computes: frozenset[int] = frozenset()  # ranks that compute for ever from that step on, and notice nothing
    hang_s: float | None = None
    slow_s: float = 0.0  # each step, on the culprit
    straggler_factor: float | None = None
    num_steps: int = 1_000_000
    step_s: float = 0.001


@dataclass
class Started:
    """Processes that may be watched from outside."""

    folder: Path
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)  # of ranks that ended: exit code, or minus the signal
    ended_at: dict[int, float] = field(default_factory=dict)

    def await_step(self) -> None:
        """All ranks are at the step of the plan."""
        until = time.monotonic() + AWAITED_S
        while not all((self.folder / f"there{rank}").exists() for rank in range(len(self.pids))):
            assert time.monotonic() < until, "the ranks do not get there"
            time.sleep(0.002)

    def await_end(self, ranks: list[int], after_s: float = 0.0) -> None:
        """after_s: what they have to do takes so long."""
        until = time.monotonic() + after_s + AWAITED_S
        waiting = [rank for rank in ranks if rank not in self.codes]
        while waiting:
            for rank in list(waiting):
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    waiting.remove(rank)
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    self.ended_at[rank] = time.monotonic()
            if time.monotonic() > until:
                for rank in waiting:
                    os.kill(self.pids[rank], signal.SIGKILL)
                raise AssertionError(f"ranks {waiting} do not end; {self.said(0)}")
            time.sleep(0.002)

    def said(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.err").read_text()

    def orphans(self) -> list[str]:
        """Command names of processes of these ranks that are still there a moment after their end."""
        until = time.monotonic() + 10.0
        while (found := in_session(self.folder)) and time.monotonic() < until:
            time.sleep(0.005)
        return found


def in_session(folder: Path) -> list[str]:
    """Processes that carry the mark which every rank puts into its working directory."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and Path(os.readlink(process / "cwd")) == folder:
                found.append((process / "comm").read_text().strip())
        except OSError:
            continue  # it ended, or is not ours
    return found


def start(plan: Plan, folder: Path) -> Started:
    folder.mkdir()
    pids = []
    for rank in range(plan.world_size):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(_rank(rank, plan, folder))
            finally:
                os._exit(1)
        pids.append(pid)
    return Started(folder, pids)


def _rank(rank: int, plan: Plan, folder: Path) -> int:
    os.chdir(folder)
    descriptor = os.open(folder / f"rank{rank}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    torch.set_num_threads(1)
    setup_logging(rank, None)
    limits = Limits(in_steps=plan.hang_s, elsewhere=AWAITED_S, waiting=None)
    settings = Settings(plan.world_size, limits, plan.straggler_factor, folder)
    with Watched(rank, settings) as watch:
        try:
            return watch.ended(_steps(rank, plan, folder, watch))
        except RuntimeError as error:
            lost = as_peer_error(error, rank, watch.cause)
            print(lost or repr(error), file=sys.stderr, flush=True)
            return watch.ended(lost.exit_code if lost else 1)


def _steps(rank: int, plan: Plan, folder: Path, watch: Watch) -> int:
    dist.init_process_group(
        "gloo", store=FileStore(str(folder / "store"), plan.world_size), rank=rank, world_size=plan.world_size
    )
    state = watch.meet(ParallelState.distributed(Grid(plan.world_size)), CPU, "127.0.0.1")
    for step in range(plan.num_steps):
        watch.begins(step)
        watch.enter("data")
        if step == plan.at_step:
            (folder / f"there{rank}").touch()
            if rank == plan.culprit and plan.trouble is not None:
                plan.trouble(state)
            if rank in plan.computes:
                time.sleep(FOR_EVER)
        watch.enter("step")
        time.sleep(plan.step_s + (plan.slow_s if rank == plan.culprit else 0.0))
        state.world.comm.barrier()
        state.world.comm.all_reduce_(torch.ones(4))
        watch.finished(step + 1)
    dist.destroy_process_group()
    return 0
