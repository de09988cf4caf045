"""The first rank's watcher hears all others, decides, and tells all: who died, that the ranks hang, who is slow."""

import hmac
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_moe.training.watch.beat import Beat
from megatron_moe.training.watch.lines import Lines, Message
from megatron_moe.training.watch.report import report, summary
from megatron_moe.training.watch.stragglers import Share, Stragglers
from megatron_moe.training.watch.verdict import Limits, Seen, culprits, hung

STACKS_S = 1.2  # how long the stacks of all ranks are awaited
GRACE_S = 0.6  # in which a survivor may notice a death, and end, by itself
LONG_GRACE_S = 30.0  # the same where a rank ended in order, though with an error: most likely all do
SAID_ENOUGH = (0, 75, 86, 87)  # exit codes that are no reason for anybody else's


@dataclass(frozen=True)
class Settings:
    """What the server needs to know of the run."""

    world_size: int
    limits: Limits
    straggler_factor: float | None  # None: slow ranks are not looked for
    log_dir: Path | None


class Server:
    """Single-threaded: its owner waits for `sockets`, and calls `serve` and `tick`."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        token: str,
        own: Callable[[Message], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """own: what is told to all ranks reaches the first one by this.   token: what a watcher has to know."""
        self._settings = settings
        self._listener = listener
        listener.settimeout(1.0)
        self._token = token
        self._own = own
        self._clock = clock
        self._unknown: list[Lines] = []
        self._ranks: dict[int, Lines] = {}
        self._greeted: set[int] = set()
        self._seen = {rank: Seen(rank) for rank in range(settings.world_size)}
        self._peers: dict[int, int] = {}
        self._windows: dict[int, int] = {}
        self._stragglers: Stragglers | None = None
        self._cause: str | None = None
        self._guilty: list[Seen] = []
        self._why = ""
        self._stacks_until: float | None = None

    def sockets(self) -> list[Any]:
        return [self._listener, *self._unknown, *self._ranks.values()]

    @property
    def owes_news(self) -> bool:
        """Somebody died, and not all watchers have come yet to hear of it."""
        return self._cause is not None and len(self._greeted) + 1 < self._settings.world_size

    def serve(self, ready: Any) -> None:
        """Something has come over one of `sockets`."""
        if ready is self._listener:
            with suppress(OSError):  # it may be gone again
                self._unknown.append(Lines(self._listener.accept()[0]))
            return
        messages = ready.receive()
        if ready in self._unknown:
            self._greet(ready, messages)
            return
        rank = next(rank for rank, lines in self._ranks.items() if lines is ready)
        for message in messages or []:
            self.take(rank, message)
        if messages is None:
            del self._ranks[rank]
            ready.close()

    def _greet(self, lines: Lines, messages: list[Message] | None) -> None:
        """Whoever does not begin with the token of this run is no watcher of it."""
        if messages == []:
            return  # half a line
        self._unknown.remove(lines)
        first, *rest = messages or [{}]
        rank = first.get("rank")
        known = hmac.compare_digest(str(first.get("token", "")), self._token)
        if not known or not isinstance(rank, int) or rank not in self._seen or rank in self._ranks:
            lines.close()
            return
        self._ranks[rank] = lines
        self._greeted.add(rank)
        for message in [first, *rest]:
            self.take(rank, message)
        if self._cause is not None:
            lines.send({"dead": self._cause, "grace": GRACE_S})

    def take(self, rank: int, message: Message) -> None:
        """What the watcher of a rank says."""
        seen = self._seen[rank]
        seen.heard_at = self._clock()
        if "host" in message:
            seen.host, seen.pid = str(message["host"]), int(message["pid"])
        if "stage" in message:
            self._peers[rank] = int(message["stage"])
        # what was decided stands: a stopped rank goes on for its stacks
        if "beat" in message and not self._guilty:
            names = {field.name for field in fields(Beat)}
            seen.beat = Beat(**{name: value for name, value in message["beat"].items() if name in names})
            seen.stalled_s = float(message["stalled"])
            seen.state = str(message["state"])
            self._compare(seen)
        if "stack" in message:
            seen.stack, seen.state = str(message["stack"]), str(message["state"])
        if "died" in message:
            self._tell_death(seen, str(message["died"]), GRACE_S)
        if "bye" in message:
            seen.left = True
            if message["bye"] not in SAID_ENOUGH:
                self._tell_death(seen, f"ended with exit code {message['bye']}", LONG_GRACE_S)

    def _tell_death(self, seen: Seen, how: str, grace: float) -> None:
        """The first one is the cause; those after it follow from it."""
        seen.left = True
        if self._cause is None:
            self._cause = f"{seen.name} {how}, {seen.beat.where}"
            self._tell_all({"dead": self._cause, "grace": grace})

    def _tell_all(self, message: Message) -> None:
        for lines in self._ranks.values():
            lines.send(message)
        self._own(message)

    def _compare(self, seen: Seen) -> None:
        """A new window of a rank's own computing time."""
        factor = self._settings.straggler_factor
        if factor is None or len(self._peers) < self._settings.world_size:
            return
        if seen.beat.window == self._windows.get(seen.rank, 0):
            return
        self._windows[seen.rank] = seen.beat.window
        if self._stragglers is None:
            self._stragglers = Stragglers(factor, self._peers)
        share = Share(seen.beat.own_s, seen.beat.spread_s)
        for slow in self._stragglers.add(seen.rank, seen.beat.window, share):
            self._own({"log": f"{self._seen[slow.rank].name} is slow: {slow}"})

    def tick(self) -> None:
        """Look whether the ranks hang; and when the stacks are there, or late, end them all."""
        now = self._clock()
        ranks = list(self._seen.values())
        if self._stacks_until is not None:
            if now > self._stacks_until or all(seen.stack for seen in ranks if seen.rank in self._ranks):
                self._end(ranks)
            return
        if self._guilty or self._cause is not None or not hung(ranks, self._settings.limits):
            return
        self._guilty, self._why = culprits(ranks, now)
        self._stacks_until = now + STACKS_S
        self._tell_all({"dump": True})

    def _end(self, ranks: list[Seen]) -> None:
        self._stacks_until = None
        text = report(ranks, self._guilty, self._why)
        if self._settings.log_dir is not None:
            _write(self._settings.log_dir / "hang.txt", text)
        print(text, end="", file=sys.stderr, flush=True)
        self._tell_all({"end": summary(self._guilty, self._why)})


def _write(path: Path, text: str) -> None:
    """The run ends as it would otherwise if the report cannot be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        print(f"megatron_moe: {path}: {error}; the report is on stderr only.", file=sys.stderr, flush=True)
