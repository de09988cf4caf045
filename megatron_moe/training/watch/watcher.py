"""The process beside a rank: looks at its record, tells the server, and ends it when it has to end.

    rank  -- bye, address of the server -->  watcher  -- beats, deaths, stacks -->  server (first rank's watcher)
          <-- dead, end, log ------------             <-- dead, dump, end -------

Plain Python in a fork of the rank; nothing of torch runs here. It ignores the signals that ask a job to stop, for its
rank is asked as well, and ends as soon as the rank has ended.
"""

import dataclasses
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.training.watch.beat import Record
from megatron_moe.training.watch.lines import Lines, Message
from megatron_moe.training.watch.processes import descendants, how_it_ended, send_signal, state_of
from megatron_moe.training.watch.server import Server, Settings

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
# asks the rank for the stacks of its threads; of those numbers that nothing else uses
DUMP_SIGNAL = signal.SIGRTMIN + 9
TICK_S = 0.25
LONGEST_TICK_S = 1.0  # the watcher itself was stopped, or starved: the rank may have been as well
CONNECT_S = 10.0
STACK_S, QUIET_S = 0.7, 0.05  # how long stacks are awaited, and that nothing more comes of them
LATE_S = 2.0  # how long the first rank's watcher outlives it for watchers that are on their way
KILL_S = 0.4  # a rank that does not end when it is told to is killed


@dataclass(frozen=True)
class Link:
    """What rank and watcher share; made before the fork."""

    rank: int
    trainer: int  # pid
    handle: int  # a descriptor of that process, readable when it has ended
    record: Record
    stacks: int  # descriptor of a file in memory
    listener: socket.socket | None  # on the first rank
    token: str
    settings: Settings


class Watcher:
    """Runs in a process of its own."""

    def __init__(self, link: Link, pipe: socket.socket) -> None:
        """pipe: to the rank."""
        self._link = link
        self._rank = Lines(pipe)
        self._rank_listens = True
        self._host = socket.gethostname()
        self._upstream: Lines | None = None
        self._server: Server | None = None
        if link.listener is not None:
            self._server = Server(link.settings, link.listener, link.token, self._obey)
        self._progress = -1
        self._stalled_s = 0.0
        self._looked_at = time.monotonic()
        self._kill_at: float | None = None
        self._doomed: list[int] = []
        self._over = False

    def run(self) -> None:
        """Until the rank has ended; the server also until all have heard who died."""
        self._report({"host": self._host, "pid": self._link.trainer})
        next_look = time.monotonic()
        while not self._over:
            now = time.monotonic()
            if now >= next_look:
                self._look(now)
                next_look = now + TICK_S
            self._kill_if_due(now)
            self._wait(min(next_look, self._kill_at or next_look) - now)
        until = time.monotonic() + LATE_S
        while self._server is not None and self._server.owes_news and (left := until - time.monotonic()) > 0:
            self._wait(left)

    def _wait(self, seconds: float) -> None:
        handlers: dict[Any, Callable[[], None]] = {}
        if not self._over:
            handlers[self._link.handle] = self._mourn
        if self._rank_listens and not self._over:
            handlers[self._rank] = self._hear_rank
        if self._upstream is not None:
            handlers[self._upstream] = self._hear_server
        served = self._server.sockets() if self._server is not None else []
        poll = select.poll()
        by_number = {each if isinstance(each, int) else each.fileno(): each for each in [*handlers, *served]}
        for number in by_number:
            poll.register(number, select.POLLIN)
        ready = [by_number[number] for number, _ in poll.poll(max(0.0, seconds) * 1000)]
        # last words count before the end
        for each in sorted(ready, key=lambda found: found is self._link.handle):
            if each not in handlers and self._server is not None:
                self._server.serve(each)
            elif not self._over:
                handlers[each]()

    def _look(self, now: float) -> None:
        beat = self._link.record.look()
        passed = min(now - self._looked_at, LONGEST_TICK_S)
        self._looked_at = now
        self._stalled_s = self._stalled_s + passed if beat.progress == self._progress else 0.0
        self._progress = beat.progress
        state = state_of(self._link.trainer)
        self._report({"beat": dataclasses.asdict(beat), "stalled": self._stalled_s, "state": state})
        if self._server is not None:
            self._server.tick()

    def _report(self, message: Message) -> None:
        if self._server is not None:
            self._server.take(self._link.rank, message)
        elif self._upstream is not None and not self._upstream.send(message):
            self._upstream = None

    def _hear_rank(self) -> None:
        messages = self._rank.receive()
        self._rank_listens = messages is not None
        for message in messages or []:
            if "server" in message:
                self._join(message)
            if "bye" in message:
                self._report({"beat": self._last_beat(), "stalled": self._stalled_s, "state": ""})
                self._report({"bye": message["bye"]} if message["bye"] is not None else {"died": message["why"]})
                self._over = True

    def _join(self, message: Message) -> None:
        if self._server is not None:
            self._server.take(self._link.rank, {"stage": message["stage"]})
            return
        try:
            host, port = message["server"]
            lines = Lines(socket.create_connection((host, port), timeout=CONNECT_S))
        except OSError as error:
            self._rank.send({"log": f"rank {self._link.rank} is not watched, {host}:{port} cannot be reached: {error}"})
            return
        about = {"rank": self._link.rank, "host": self._host, "pid": self._link.trainer, "stage": message["stage"]}
        lines.send({"token": message["token"], **about})
        self._upstream = lines

    def _hear_server(self) -> None:
        assert self._upstream is not None
        messages = self._upstream.receive()
        if messages is None:
            # the first rank has ended: its ranks notice by themselves, or are told by their launcher
            self._upstream = None
        for message in messages or []:
            self._obey(message)

    def _obey(self, message: Message) -> None:
        """What the server tells all ranks."""
        if "dump" in message:
            state = state_of(self._link.trainer)
            self._report({"state": state, "stack": self._stacks(state)})
            return
        self._rank.send(message)
        if "end" in message:
            self._kill_at = time.monotonic() + KILL_S
        if "dead" in message:
            self._kill_at = time.monotonic() + message["grace"] + KILL_S

    def _stacks(self, state: str) -> str:
        """Python stacks of all threads of the rank. A stopped one goes on first: it is ended in a moment anyway."""
        before = os.fstat(self._link.stacks).st_size
        send_signal(self._link.trainer, DUMP_SIGNAL)
        if state == "T":
            send_signal(self._link.trainer, signal.SIGCONT)
        until, size, changed_at = time.monotonic() + STACK_S, before, time.monotonic()
        while (now := time.monotonic()) < until and (size == before or now - changed_at < QUIET_S):
            time.sleep(0.005)
            if os.fstat(self._link.stacks).st_size != size:
                size, changed_at = os.fstat(self._link.stacks).st_size, now
        return os.pread(self._link.stacks, size - before, before).decode(errors="replace") or "(none came)"

    def _mourn(self) -> None:
        """The rank has ended without saying so."""
        for pid in self._doomed:
            send_signal(pid, signal.SIGKILL)
        if self._kill_at is None:
            self._report({"beat": self._last_beat(), "stalled": self._stalled_s, "state": "Z"})
            self._report({"died": how_it_ended(self._link.trainer)})
        self._over = True

    def _last_beat(self) -> Message:
        return dataclasses.asdict(self._link.record.look())

    def _kill_if_due(self, now: float) -> None:
        if self._kill_at is None:
            return
        if not self._doomed:
            self._doomed = descendants(self._link.trainer, but=os.getpid())
        if now >= self._kill_at:
            send_signal(self._link.trainer, signal.SIGKILL)
            self._kill_at = now + TICK_S


def watch(link: Link, pipe: socket.socket) -> None:
    """Everything that the forked process does; never returns."""
    try:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        Path("/proc/self/comm").write_text("moe-watcher")
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each rank
        kept = {0, 1, 2, link.handle, link.stacks, pipe.fileno()}
        if link.listener is not None:
            kept.add(link.listener.fileno())
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in kept:
                _close(int(name))
        # what it was may have been closed just now
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        Watcher(link, pipe).run()
    except BaseException:  # nobody else would hear of it; the rank goes on, unwatched
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        # nothing of what the fork brought along is to be finished here
        os._exit(0)


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:
        return  # that of the listing itself
