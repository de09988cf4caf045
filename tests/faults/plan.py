"""Faults by name, and the points of a run at which they can strike.

    ckpt.before_manifest:kill@rank2,step40      the rank 2 is killed before the manifest of step 40 is written
    storage.any:ENOSPC@step4,nth7               after step 4, the seventh call to the disk finds it full
    step.begin:stop@rank1,step3+                rank 1 is stopped when step 3, or a later one, begins
"""

import errno
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

# every change that a checkpoint makes to a disk: the methods of checkpoint/storage.py
CALLS = (
    "make_dir",
    "create",
    "write",
    "fsync",
    "close",
    "sync_dir",
    "rename",
    "symlink",
    "unlink",
    "remove_dir",
)
POINTS = {
    "startup.begin": "the ranks have met, nothing is built",
    "startup.built": "model, optimizer and corpus are there",
    "load.begin": "before the newest checkpoint is looked for",
    "load.end": "it is loaded",
    "data.read": "a microbatch is about to be read",
    "step.begin": "before the batches of a step are asked for",
    "step.forward": "before the forward pass of a microbatch",
    "step.gradients": "after the last backward pass, before gradients are summed to the end",
    "step.reduced": "gradients are summed and clipped, nothing is updated",
    "step.updated": "the optimizer has updated its share",
    "weights.gathered": "all ranks have all updated weights",
    "eval.begin": "before an evaluation",
    "eval.batch": "before one of its batches",
    "ckpt.snapshot": "before the blocks are copied to host memory",
    "ckpt.before_manifest": "all files are there but the manifest",
    "ckpt.before_rename": "the folder is whole, not yet visible",
    "ckpt.after_rename": "it is visible, its name not yet on the disk",
    "ckpt.link": "before the new link `latest` is made beside the old",
    "ckpt.link_swap": "before it takes the old one's place",
    "ckpt.rotate": "before an old checkpoint is put aside",
    "ckpt.remove": "before something in it is removed",
    "restarts.any": "a call to the disk for restarts.json",
    "storage.any": "any call to the disk for a checkpoint",
    **{f"storage.{call}": f"a call of Storage.{call}" for call in CALLS},
}
ERRNOS = {name: getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE")}
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "TERM": signal.SIGTERM,
    "USR1": signal.SIGUSR1,
    "INT": signal.SIGINT,
}
# short: half of the bytes are taken, and said so; cut: half are taken, all said; flip: one bit differs on the disk
OF_WRITES = ("short", "cut", "flip")
KINDS = (*SIGNALS, "raise", "delay", *ERRNOS, *OF_WRITES, "nan")
_LINE = re.compile(r"([a-z_.]+):([A-Za-z0-9]+)(?:@(.+))?")
_WORDS = {"rank": re.compile(r"rank(\d+)"), "step": re.compile(r"step(\d+)(\+?)"), "nth": re.compile(r"nth(\d+)")}


@dataclass(frozen=True)
class Fault:
    """What strikes where. rank None: any rank; step None: any time; onward: that step or a later one."""

    point: str
    kind: str
    rank: int | None = None
    step: int | None = None
    onward: bool = False
    nth: int = 1  # of the times that rank and step fit, counted from 1

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ValueError(f"no point {self.point!r}; there are {', '.join(POINTS)}")
        if self.kind not in KINDS:
            raise ValueError(f"no fault {self.kind!r}; there are {', '.join(KINDS)}")
        on_disk = self.point.startswith(("storage.", "restarts."))
        fits = {
            **dict.fromkeys(ERRNOS, on_disk or self.point == "data.read"),
            **dict.fromkeys(OF_WRITES, self.point in ("storage.write", "storage.any")),
            "nan": self.point == "step.begin",
        }
        if not fits.get(self.kind, True) or self.nth < 1:
            raise ValueError(f"{self.kind} number {self.nth} cannot strike at {self.point}")

    @classmethod
    def parse(cls, line: str) -> "Fault":
        """The inverse of str()."""
        found = _LINE.fullmatch(line.strip())
        if not found:
            raise ValueError(f"{line!r} is no fault; write as ckpt.before_manifest:kill@rank2,step40+,nth1")
        given: dict[str, int] = {}
        onward = False
        for word in found[3].split(",") if found[3] else []:
            match = next((match for form in _WORDS.values() if (match := form.fullmatch(word))), None)
            name = word.rstrip("+0123456789")
            if not match or name in given:
                raise ValueError(f"{line!r}: {word!r} is none of rank2, step40, step40+, nth1, each once")
            given[name] = int(match[1])
            onward |= word.endswith("+")
        return cls(found[1], found[2], given.get("rank"), given.get("step"), onward, given.get("nth", 1))

    def __str__(self) -> str:
        words = [f"rank{self.rank}"] if self.rank is not None else []
        words += [f"step{self.step}{'+' * self.onward}"] if self.step is not None else []
        words += [f"nth{self.nth}"] if self.nth != 1 else []
        return f"{self.point}:{self.kind}" + (f"@{','.join(words)}" if words else "")

    def fits(self, rank: int, step: int) -> bool:
        """Whether it may strike on this rank in this step."""
        if self.rank is not None and self.rank != rank:
            return False
        return self.step is None or step == self.step or (self.onward and step > self.step)


@dataclass(frozen=True)
class FaultPlan:
    """Faults of one attempt; each strikes once."""

    faults: tuple[Fault, ...] = ()

    @classmethod
    def of(cls, faults: Sequence[Fault]) -> "FaultPlan":
        return cls(tuple(faults))

    @classmethod
    def parse(cls, line: str) -> "FaultPlan":
        """Faults with semicolons between them."""
        return cls(tuple(Fault.parse(part) for part in line.split(";") if part.strip()))

    def __str__(self) -> str:
        return "; ".join(map(str, self.faults))
