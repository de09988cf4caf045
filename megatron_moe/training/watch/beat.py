"""What a rank is doing: a record in memory that it shares with its watcher, written without a lock."""

import mmap
import struct
from dataclasses import dataclass
from statistics import median

from megatron_moe.parallel.noted import Notes

# "ending": after the last step
SECTIONS = ("start-up", "loading", "data", "step", "evaluation", "saving", "ending")
WINDOW = 16  # steps of which the own time is compared between ranks

# four counters; step; section; window, own seconds and their spread; axis and kind of a collective
_WHOLE = struct.Struct("<QQQQqQQdd16s24s")
_COUNTERS, _NAMES = struct.Struct("<QQQQ"), struct.Struct("<16s24s")
_STEP_AT, _SECTION_AT, _WINDOW_AT, _NAMES_AT = 32, 40, 48, 72


@dataclass(frozen=True)
class Beat:
    """One look at the record."""

    progress: int = 0  # changes with everything that is noted
    step: int = 0  # finished
    started: int = 0  # collectives and messages, on all axes
    finished: int = 0
    waiting: int = 0  # threads of the rank that wait for one
    section: str = SECTIONS[0]
    window: int = 0  # finished windows of WINDOW steps
    own_s: float = 0.0  # median over the steps of the last one: seconds outside of waiting for other ranks
    spread_s: float = 0.0  # their median distance from it
    axis: str = ""
    kind: str = ""

    @property
    def where(self) -> str:
        """In words, to follow "rank 3"."""
        place = f"in step {self.step + 1}" if self.section in ("data", "step") else f"after step {self.step}"
        return f"{place}, section '{self.section}', {self.last_collective}"

    @property
    def last_collective(self) -> str:
        if not self.started:
            return "before its first collective"
        name = f"collective number {self.started} ({self.kind} on {self.axis})"
        return f"waiting in {name}" if self.waiting else f"last {name}, not waiting"


class Record(Notes):
    """The memory of one rank. Made before its watcher is forked; the rank writes, the watcher looks."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _WHOLE.size)
        self._progress = self._started = self._finished = self._waiting = self._windows = 0
        self._waited = 0.0  # seconds since the step began
        self._own: list[float] = []

    def look(self) -> Beat:
        """May see a collective half written; the next look sees it whole."""
        *numbers, axis, kind = _WHOLE.unpack_from(self._memory)
        progress, started, finished, waiting, step, section, window, own, spread = numbers
        names = (name.rstrip(b"\0").decode(errors="replace") for name in (axis, kind))
        return Beat(progress, step, started, finished, waiting, SECTIONS[section], window, own, spread, *names)

    def _moved(self) -> None:
        self._progress += 1
        _COUNTERS.pack_into(self._memory, 0, self._progress, self._started, self._finished, self._waiting)

    def enter(self, section: str) -> None:
        """What it does from now on: one of SECTIONS."""
        struct.pack_into("<Q", self._memory, _SECTION_AT, SECTIONS.index(section))
        self._moved()

    def starts(self, axis: str, kind: str) -> None:
        self._started += 1
        _NAMES.pack_into(self._memory, _NAMES_AT, axis.encode(), kind.encode())
        self._moved()

    def waits(self) -> None:
        self._waiting += 1
        self._moved()

    def arrived(self, seconds: float) -> None:
        self._waited += seconds
        self._waiting -= 1
        self._finished += 1
        self._moved()

    def at_step(self, step: int) -> None:
        """step: finished ones."""
        struct.pack_into("<q", self._memory, _STEP_AT, step)
        self._moved()

    def step_took(self, seconds: float) -> None:
        """The step that just finished, waiting included."""
        self._own.append(max(0.0, seconds - self._waited))
        if len(self._own) == WINDOW:
            middle = median(self._own)
            spread = median(abs(own - middle) for own in self._own)
            self._windows += 1
            struct.pack_into("<Qdd", self._memory, _WINDOW_AT, self._windows, middle, spread)
            self._own.clear()

    def step_begins(self) -> None:
        self._waited = 0.0
