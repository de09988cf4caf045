"""Ranks that compute more slowly than those that do the same work, found in their own times per step."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from megatron_moe.training.watch.beat import WINDOW

HISTORY = 64  # windows
KEPT = 8  # windows for which a rank's figure is still awaited
CERTAIN = 4.0  # standard errors
SMALLEST_S = 0.001  # a step
# of a normal variable: standard deviation / median distance from the median, and the same of the median / of the mean
_FROM_SPREAD, _OF_MEDIAN = 1.4826, 1.2533


@dataclass(frozen=True)
class Share:
    """A rank's own seconds per step in one window: their median, and their median distance from it."""

    own_s: float
    spread_s: float

    @property
    def error_s(self) -> float:
        """Standard error of the median."""
        return _OF_MEDIAN * _FROM_SPREAD * self.spread_s / math.sqrt(WINDOW)


@dataclass(frozen=True)
class Slow:
    """A rank that is slow in this window and was in the one before."""

    rank: int
    factor: float  # against the median of its peers
    own_factor: float | None  # against its own windows before it was slow; None: it always was
    windows: int  # in a row

    def __str__(self) -> str:
        before = "as ever" if self.own_factor is None else f"{self.own_factor:.2f} times its own before"
        return (
            f"{self.factor:.2f} times the computing time per step of its peers (median), {before}, "
            f"for {self.windows * WINDOW} steps"
        )


@dataclass
class Stragglers:
    """Takes each rank's windows as they come; a rank that is slow twice in a row is told, then ever more rarely.

    factor: how much slower than its peers is slow.  peers: for each rank the name of those that do the same work.
    """

    factor: float
    peers: Mapping[int, int]
    _windows: dict[int, dict[int, Share]] = field(default_factory=dict)
    _row: dict[int, int] = field(default_factory=dict)  # slow windows in a row
    _history: dict[int, deque[float]] = field(default_factory=dict)

    def add(self, rank: int, window: int, share: Share) -> list[Slow]:
        """One rank's window; when it is the last of its number, who is slow and has to be told of."""
        shares = self._windows.setdefault(window, {})
        shares[rank] = share
        for old in [number for number in self._windows if number <= window - KEPT]:
            del self._windows[old]
        if len(shares) < len(self.peers):
            return []
        del self._windows[window]
        return [slow for rank in sorted(shares) if (slow := self._judge(rank, shares)) is not None]

    def _judge(self, rank: int, shares: Mapping[int, Share]) -> Slow | None:
        mine = shares[rank]
        peers = [share for other, share in shares.items() if other != rank and self.peers[other] == self.peers[rank]]
        history = self._history.setdefault(rank, deque(maxlen=HISTORY))
        if not peers or not self._is_slow(mine, peers):
            self._row[rank] = 0
            history.append(mine.own_s)
            return None
        self._row[rank] = row = self._row.get(rank, 0) + 1
        # the second window, the fourth, the eighth ...
        if row < 2 or row & (row - 1):
            return None
        usual = median(share.own_s for share in peers)
        own_factor = mine.own_s / max(median(history), 1e-9) if history else None
        return Slow(rank, mine.own_s / max(usual, 1e-9), own_factor, row)

    def _is_slow(self, mine: Share, peers: list[Share]) -> bool:
        """Nearer to `factor` than to 1, by more than chance and than a millisecond."""
        usual = median(share.own_s for share in peers)
        error = math.hypot(mine.error_s, median(share.error_s for share in peers))
        excess = mine.own_s - usual
        half_way = (self.factor - 1) * 0.6 * usual
        return excess > max(half_way, CERTAIN * error / 2, SMALLEST_S)
