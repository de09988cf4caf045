"""A rank's own side of being watched: what it notes, and the thread that ends it when its watcher says so."""

import faulthandler
import logging
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

from megatron_moe.checkpoint.messages import told_by_first
from megatron_moe.config.errors import HangError, PeerError
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.launch import Place
from megatron_moe.parallel.noted import noted
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.watch.beat import Record
from megatron_moe.training.watch.lines import Lines, Message
from megatron_moe.training.watch.server import Settings
from megatron_moe.training.watch.verdict import Limits
from megatron_moe.training.watch.watcher import DUMP_SIGNAL, Link, watch

logger = logging.getLogger(__name__)

CAUSE_S = 3.0  # how long an error waits at most for the news of who died, which on a busy machine takes its time
GOODBYE_S = 2.0
BEFORE_TIMEOUT = 0.9  # of a collective's own timeout, after which it would fail without naming anybody
# a mesh is made of their process groups, which is not done through a wrapper
SHARDED_AXES = ("dp", "dp_cp", "edp")


class Watch:
    """Nobody watches: nothing is noted."""

    def enter(self, section: str) -> None:
        """The rank is in another part of its work: one of beat.SECTIONS."""

    def begins(self, step: int) -> None:
        """A step begins. step: finished ones."""

    def finished(self, step: int) -> None:
        """A step is over. step: finished ones, itself included."""

    def cause(self) -> str | None:
        """Who died, after an error that another rank's death may have brought; waits a moment for it."""
        return None

    def meet(self, state: ParallelState, device: torch.device, host: str) -> ParallelState:
        """The ranks have met: their watchers may meet as well; returns the state to use. Collective.

        host: where the first rank is.
        """
        return state

    def ended(self, code: int) -> int:
        """The exit code, which it returns, is known: the rank ends in good order."""
        return code

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class Watched(Watch):
    """Forks the watcher when the `with` block begins, which must be before CUDA is used and before the ranks join."""

    def __init__(self, rank: int, settings: Settings, *, alone: bool = True, plain: Collection[str] = ()) -> None:
        """alone: all ranks are on this machine.   plain: axes whose collectives are not noted."""
        self._rank = rank
        self._settings = settings
        self._alone = alone
        self._plain = plain
        self._record = Record()
        self._token = secrets.token_hex(16)
        self._port = 0
        self._code: int | None = None
        self._joined = False
        self._cause: str | None = None
        self._told = threading.Event()
        self._leaving = threading.Event()
        self._began = time.perf_counter()

    def __enter__(self) -> "Watched":
        listener = None
        if self._rank == 0:
            listener = _listener(self._alone)
            self._port = listener.getsockname()[1]
        ours, theirs = socket.socketpair()
        self._stacks = os.memfd_create("stacks")
        handle = os.pidfd_open(os.getpid())
        link = Link(
            self._rank, os.getpid(), handle, self._record, self._stacks, listener, self._token, self._settings
        )
        faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self._watcher = os.fork()
        if self._watcher == 0:
            ours.close()
            watch(link, theirs)
        theirs.close()
        os.close(handle)
        if listener is not None:
            listener.close()
        self._pipe = Lines(ours)
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()
        return self

    def meet(self, state: ParallelState, device: torch.device, host: str) -> ParallelState:
        port, token = told_by_first(f"{self._port} {self._token}", state.world, device).split()
        address = ["127.0.0.1" if self._alone else host, int(port)]
        self._pipe.send({"server": address, "token": token, "stage": state.pp.rank})
        self._joined = True
        return noted(state, self._record, self._plain)

    def enter(self, section: str) -> None:
        self._record.enter(section)

    def begins(self, step: int) -> None:
        self._record.at_step(step)
        self._record.step_begins()
        self._began = time.perf_counter()

    def finished(self, step: int) -> None:
        self._record.step_took(time.perf_counter() - self._began)
        self._record.at_step(step)

    def cause(self) -> str | None:
        if self._joined:
            self._told.wait(CAUSE_S)
        self._leaving.set()
        return self._cause

    def ended(self, code: int) -> int:
        self._code = code
        return code

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        why = None if kind is None else f"failed with {kind.__name__}: {error}"
        self._pipe.send({"bye": self._code, "why": why})
        with suppress(OSError):
            self._pipe.socket.shutdown(socket.SHUT_WR)
        self._bury()
        self._thread.join(GOODBYE_S)
        self._pipe.close()
        faulthandler.unregister(DUMP_SIGNAL)
        os.close(self._stacks)

    def _bury(self) -> None:
        """The watcher ends by itself; one that cannot does not stay behind either."""
        until = time.monotonic() + GOODBYE_S
        while os.waitpid(self._watcher, os.WNOHANG)[0] == 0:
            if time.monotonic() > until:
                os.kill(self._watcher, signal.SIGKILL)
                os.waitpid(self._watcher, 0)
                return
            time.sleep(0.002)

    def _listen(self) -> None:
        """In a thread of its own: what the watcher says, until it is gone."""
        deadline: float | None = None
        # not select(), which refuses the handles above 1023 of a process that has many files open
        news = select.poll()
        news.register(self._pipe, select.POLLIN)
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not news.poll(None if left is None else 1000 * left):
                self._give_up(PeerError.exit_code, f"rank {self._rank} lost another rank: {self._cause}.")
            messages = self._pipe.receive()
            if messages is None:
                return
            for message in messages:
                deadline = self._hear(message, deadline)

    def _hear(self, message: Message, deadline: float | None) -> float | None:
        """Returns when the rank has to have ended, by the monotonic clock."""
        if "log" in message:
            logger.warning(message["log"])
        if "end" in message:
            self._give_up(HangError.exit_code, f"rank {self._rank} is ended: {message['end']}.")
        if "dead" in message:
            self._cause = message["dead"]
            self._told.set()
            return time.monotonic() + float(message["grace"])
        return deadline

    def _give_up(self, code: int, text: str) -> None:
        """The other threads compute, wait or are lost: nothing is to be finished by them."""
        if not self._leaving.is_set() or code == HangError.exit_code:
            print(f"megatron_moe: {text}", file=sys.stderr, flush=True)
        os._exit(code)


def _listener(alone: bool) -> socket.socket:
    """Where the other ranks' watchers come to."""
    if alone:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def watched(config: RunConfig, place: Place, *, alone: bool) -> Watch:
    """How the rank of a main program is watched; not at all when it is alone and may take as long as it likes.

    alone: all ranks are on this machine.
    """
    parallel = config.parallel
    if place.world_size == 1 and parallel.hang_timeout_s is None:
        return Watch()
    limits = Limits(
        in_steps=parallel.hang_timeout_s,
        elsewhere=None if parallel.hang_timeout_s is None else parallel.hang_timeout_outside_steps_s,
        waiting=BEFORE_TIMEOUT * 60 * parallel.distributed_timeout_minutes,
    )
    log_dir = Path(config.logging.log_dir) if config.logging.log_dir else None
    settings = Settings(place.world_size, limits, parallel.straggler_factor, log_dir)
    plain = SHARDED_AXES if parallel.shards_parameters else ()
    return Watched(place.rank, settings, alone=alone, plain=plain)
