"""Whether the ranks hang, and on whose account: decided from what each was last seen doing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_moe.training.watch.beat import SECTIONS, Beat

IN_STEPS = ("data", "step", "evaluation")
SILENT_S = 3.0  # a watcher from which nothing came for so long is dead, stopped or cut off


@dataclass(frozen=True)
class Limits:
    """Seconds without any progress after which a rank hangs; None: never."""

    in_steps: float | None  # reading data, training, evaluating
    elsewhere: float | None  # at start-up, while loading and saving
    waiting: float | None  # for other ranks, wherever: a collective would fail soon after, and name nobody

    def of(self, beat: Beat) -> float | None:
        limit = self.in_steps if beat.section in IN_STEPS else self.elsewhere
        if limit is not None and beat.waiting and self.waiting is not None:
            return min(limit, self.waiting)
        return limit


@dataclass
class Seen:
    """What is known of one rank."""

    rank: int
    host: str = "an unknown host"
    pid: int = 0
    beat: Beat = field(default_factory=Beat)
    stalled_s: float = 0.0  # without progress
    state: str = ""  # of its process: one letter
    heard_at: float | None = None  # by the clock of the server; None: never
    left: bool = False  # it has ended in good order
    stack: str = ""

    def silent(self, now: float) -> bool:
        return self.heard_at is None or now - self.heard_at > SILENT_S

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def hung(ranks: Sequence[Seen], limits: Limits) -> list[Seen]:
    """Those that made no progress for longer than they may."""
    found = []
    for seen in ranks:
        limit = limits.of(seen.beat)
        if not seen.left and seen.heard_at is not None and limit is not None and seen.stalled_s > limit:
            found.append(seen)
    return found


def culprits(ranks: Sequence[Seen], now: float) -> tuple[list[Seen], str]:
    """For whom the others wait, and why it is they. All, when nothing tells them apart."""
    here = [seen for seen in ranks if not seen.left]
    gone = [seen for seen in here if seen.silent(now)]
    if gone:
        return gone, "nothing comes from its watcher any more"
    stopped = [seen for seen in here if seen.state in ("T", "t")]
    if stopped:
        return stopped, "its process is stopped"
    busy = [seen for seen in here if not seen.beat.waiting]
    if 0 < len(busy) < len(here):
        return _behind(busy), "it has not reached the collective in which others wait"
    places = Counter((seen.beat.axis, seen.beat.kind, seen.beat.section) for seen in here)
    common, number = places.most_common(1)[0]
    others = [seen for seen in here if (seen.beat.axis, seen.beat.kind, seen.beat.section) != common]
    if others and 2 * number > len(here):
        return others, "it is in another collective than the others"
    late = _behind(here)
    why = "it is behind the others" if len(late) < len(here) else "all ranks are at the same place"
    return late, why


def _behind(ranks: Sequence[Seen]) -> list[Seen]:
    """Those that have done least."""
    done: Mapping[int, tuple[int, int, int]] = {
        seen.rank: (seen.beat.step, SECTIONS.index(seen.beat.section), seen.beat.started) for seen in ranks
    }
    least = min(done.values())
    return [seen for seen in ranks if done[seen.rank] == least]
