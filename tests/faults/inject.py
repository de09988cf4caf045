"""Letting faults strike: a Trainer and its disk, wrapped from outside. Nothing of this is in a normal run."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.manifest import MANIFEST
from megatron_moe.checkpoint.rotate import LATEST, step_of
from megatron_moe.training.trainer import Trainer
from tests.checkpoint.samples import HastyStorage
from tests.faults.plan import ERRNOS, OF_WRITES, SIGNALS, Fault, FaultPlan

DELAY_S = 0.2


class InjectedError(RuntimeError):
    """What a fault of kind `raise` raises."""


class Faults:
    """The faults of a plan on one rank. now: the step that is being done, counted from 1; 0 before the first."""

    def __init__(self, plan: FaultPlan, rank: int, inbox: Path | None = None) -> None:
        """inbox: a file in which a fault may be handed in while the job runs."""
        self.now = 0
        self.reached: Counter[str] = Counter()
        self.struck: list[tuple[Fault, int]] = []  # with the step
        self.poison: Callable[[], None] | None = None
        self._rank = rank
        self._inbox = inbox
        self._left = [[fault, 0] for fault in plan.faults]
        self._lock = threading.Lock()  # a checkpoint is written by a thread

    def listen(self) -> None:
        """Take the fault that was handed in, if it is for this rank."""
        if self._inbox is None or not self._inbox.exists():
            return
        fault = Fault.parse(self._inbox.read_text())
        if fault.rank == self._rank:
            self._inbox.unlink()
            with self._lock:
                self._left.append([fault, 0])

    def take(self, *points: str) -> Fault | None:
        """The fault that is due at a place with these names; it is used up."""
        with self._lock:
            self.reached.update(points)
            for entry in self._left:
                fault: Any = entry[0]
                if fault.point in points and fault.fits(self._rank, self.now):
                    entry[1] += 1
                    if entry[1] == fault.nth:
                        self._left.remove(entry)
                        self.struck.append((fault, self.now))
                        return fault  # type: ignore[no-any-return]
        return None

    def reach(self, *points: str) -> None:
        """A place with these names: a fault that is due strikes."""
        fault = self.take(*points)
        if fault is not None:
            self.strike(fault)

    def strike(self, fault: Fault) -> None:
        if fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.kind])
        elif fault.kind in ERRNOS:
            raise OSError(ERRNOS[fault.kind], os.strerror(ERRNOS[fault.kind]))
        elif fault.kind == "delay":
            time.sleep(DELAY_S)
        elif fault.kind == "nan":
            assert self.poison is not None
            self.poison()
        elif fault.kind == "raise":
            raise InjectedError(str(fault))

    def around(self, owner: Any, name: str, before: str = "", after: str = "") -> None:
        """Let a method of an object reach a point before and after its work."""
        work = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if before:
                self.reach(before)
            result = work(*arguments, **options)
            if after:
                self.reach(after)
            return result

        setattr(owner, name, wrapped)


class FaultyStorage(HastyStorage):
    """The operating system's files, whose every call is a point; of `restarts`, they are all the same one.

    Kills cut no power: nobody waits for the disk.
    """

    def __init__(self, faults: Faults, of: str = "storage") -> None:
        self._faults = faults
        self._of = of

    def _names(self, call: str, *more: str) -> list[str]:
        return ["storage.any", f"storage.{call}", *more] if self._of == "storage" else [f"{self._of}.any"]

    def _reach(self, call: str, *more: str) -> None:
        self._faults.reach(*self._names(call, *more))

    def make_dir(self, path: Path) -> None:
        self._reach("make_dir")
        super().make_dir(path)

    def create(self, path: Path) -> int:
        self._reach("create", *(["ckpt.before_manifest"] if path.name == MANIFEST else []))
        return super().create(path)

    def write(self, file: int, data: memoryview) -> int:
        fault = self._faults.take(*self._names("write"))
        if fault is None:
            return super().write(file, data)
        half = data[: len(data) // 2]
        if fault.kind == "flip":
            return super().write(file, _flipped(data))
        if fault.kind in OF_WRITES:
            taken = super().write(file, half) if len(half) else 0
            return len(data) if fault.kind == "cut" else taken
        if fault.kind == "kill":
            super().write(file, half)
        self._faults.strike(fault)
        return super().write(file, data)

    def fsync(self, file: int) -> None:
        self._reach("fsync")
        super().fsync(file)

    def close(self, file: int) -> None:
        # what cannot be closed is closed all the same, as on Linux
        try:
            self._reach("close")
        finally:
            super().close(file)

    def sync_dir(self, path: Path) -> None:
        self._reach("sync_dir")
        super().sync_dir(path)

    def rename(self, old: Path, new: Path) -> None:
        shown = step_of(new.name) is not None
        more = ["ckpt.before_rename"] if shown else []
        more += ["ckpt.link_swap"] if new.name == LATEST else []
        more += ["ckpt.rotate"] if new.name.endswith(".tmp-removed") else []
        self._reach("rename", *more)
        super().rename(old, new)
        if shown:
            self._faults.reach("ckpt.after_rename")

    def symlink(self, target: str, link: Path) -> None:
        self._reach("symlink", "ckpt.link")
        super().symlink(target, link)

    def unlink(self, path: Path) -> None:
        self._reach("unlink", *(["ckpt.remove"] if path.parent.name.endswith(".tmp-removed") else []))
        super().unlink(path)

    def remove_dir(self, path: Path) -> None:
        self._reach("remove_dir")
        super().remove_dir(path)


def _flipped(data: memoryview) -> memoryview:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return memoryview(changed)


def attach(trainer: Trainer, faults: Faults) -> None:
    """Let every point of this trainer be reached."""
    engine = trainer.engine
    _attach_steps(trainer, faults)
    faults.around(trainer, "restore", before="load.begin", after="load.end")
    faults.around(trainer.loader.dataset, "get", before="data.read")
    faults.around(trainer, "validation_loss", before="eval.begin")
    faults.around(engine, "evaluate", before="eval.batch")
    faults.around(engine.optimizer, "step", before="step.reduced", after="step.updated")
    faults.around(engine.buckets, "settle", after="weights.gathered")
    faults.around(engine._executor, "train", after="step.gradients")
    _attach_forward(engine, faults)
    if trainer.writer is not None:
        faults.around(trainer.writer, "save", before="ckpt.snapshot")
        trainer.writer._storage = trainer.writer._rotation._storage = FaultyStorage(faults)
    trainer._restarts._storage = FaultyStorage(faults, "restarts")


def _attach_steps(trainer: Trainer, faults: Faults) -> None:
    step, weights = trainer.train_step, [w for module in trainer.engine.modules for w in module.parameters()]

    def poison() -> None:
        weights[0].data.view(-1)[:1] = float("nan")

    def watched() -> Any:
        faults.now = trainer.step + 1
        faults.listen()
        faults.reach("step.begin")
        return step()

    faults.poison = poison
    trainer.train_step = watched  # type: ignore[method-assign]


def _attach_forward(engine: Any, faults: Faults) -> None:
    make = engine._program

    def made(*arguments: Any, **options: Any) -> Any:
        program, counts = make(*arguments, **options)
        faults.around(program, "forward", before="step.forward")
        return program, counts

    engine._program = made
