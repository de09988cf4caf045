"""A run that is disturbed, and the same run undisturbed: the hash of every step must agree."""

import json
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.end_to_end.tiny_job import Step, attempt, job, read_steps
from tests.faults.leaks import Held, leaked, left_by_saves
from tests.faults.plan import Fault, FaultPlan
from tests.faults.supervisor import Attempt, Ended

TP, EP = "tensor_model_parallel_size", "expert_model_parallel_size"
WORLD = 4
STEPS, INTERVAL = 12, 2
# gshard draws its second expert, deepseek_v3 remembers a bias for each expert: a wrong counter or a lost buffer shows
JOBS: dict[str, dict[str, Mapping[str, Any]]] = {
    "ZeRO-1": {"moe": {"router_type": "gshard"}},
    "no ZeRO": {"parallel": {"data_parallel_sharding_strategy": "no_shard"}, "moe": {"router_type": "gshard"}},
    "TP 2 x EP 2": {"parallel": {TP: 2, EP: 2}, "moe": {"router_type": "deepseek_v3", "aux_loss_coeff": 0.0}},
    "saved at once": {
        "checkpoint": {"async_save": False},
        "moe": {"router_type": "deepseek_v3", "aux_loss_coeff": 0.0},
    },
}
LIMIT_S = 300.0  # nothing here takes seconds; a busy machine may


def tiny(corpus: Path, saved: Path, name: str, **training: Any) -> str:
    """The configuration of a job of JOBS, as text."""
    changes = dict(JOBS[name])
    saving = {
        "save": str(saved),
        "load": "latest",
        "save_interval": INTERVAL,
        "keep": 2,
        "max_restarts_without_progress": None,
        **changes.pop("checkpoint", {}),
    }
    return job(corpus, **changes, checkpoint=saving, training={"train_iters": STEPS, **training}).to_json()


class Run:
    """One run in a folder, attempt after attempt."""

    def __init__(self, folder: Path, text: str, world_size: int = WORLD) -> None:
        self.folder = folder
        self.saved = folder / "saved"
        self.notes = folder / "notes"
        self.notes.mkdir(parents=True)
        self.attempts = 0
        self.restart_s: list[float] = []  # from an end to the next finished step of all ranks
        self._text = text
        self._world_size = world_size
        self._ended: float | None = None
        self._begins: list[int] = []  # where each rank's notes of this attempt begin, in bytes
        self._before = Held.now()

    def start(self, plan: FaultPlan | None = None, inbox: Path | None = None, pace_s: float = 0.0) -> Attempt:
        number, self.attempts = self.attempts, self.attempts + 1
        self._begins = [self._size(rank) for rank in range(self._world_size)]
        log = self.folder / "log.txt"
        return Attempt(self._world_size, log, attempt, self._text, str(self.notes), number, plan, inbox, pace_s)

    def finish(self, limit_s: float = LIMIT_S) -> None:
        """Undisturbed, to the end."""
        ended = self.start().wait(limit_s)
        assert ended is not None and ended.code == 0, (ended, self.said())
        self.note(ended)

    def kill_at(self, fault: Fault) -> None:
        """One attempt that this fault ends."""
        ended = self.start(FaultPlan((fault,))).wait(LIMIT_S)
        assert ended is not None and ended.codes[fault.rank or 0] == -signal.SIGKILL, (str(fault), ended, self.said())
        self.note(ended)

    def kill_after(self, rank: int, step: int, delay_s: float) -> None:
        """One attempt; the rank is killed from outside, some time after it has done a step."""
        running = self.start()
        until = time.monotonic() + LIMIT_S
        while not self._did(rank, step):
            assert time.monotonic() < until, self.said()
            time.sleep(0.003)
        time.sleep(delay_s)
        running.send(signal.SIGKILL, rank)
        ended = running.wait(LIMIT_S)
        assert ended is not None, self.said()
        self.note(ended)

    def steps(self) -> list[Step]:
        return read_steps(self.notes, self._world_size)

    def log(self) -> str:
        """All that the ranks said."""
        log = self.folder / "log.txt"
        return log.read_text() if log.exists() else ""

    def said(self) -> str:
        return self.log()[-3000:]

    def check(self, expected: list[Step]) -> None:
        """Every step that was ever done is that of the undisturbed run, to the last."""
        by_step = {step.step: step for step in expected}
        for step in self.steps():
            wanted = by_step[step.step]
            assert (step.samples, step.consumed) == (wanted.samples, wanted.consumed), step
            assert (step.loss, step.state) == (wanted.loss, wanted.state), step
        assert self.steps()[-1].step == expected[-1].step
        assert left_by_saves(self.saved) == []

    def steps_of_attempt(self, rank: int = 0) -> int:
        """How many steps a rank has done in the attempt that runs."""
        return len(self._lines_of_attempt(rank))

    def has_begun(self) -> bool:
        """Whether all ranks have done a step of it."""
        return all(self.steps_of_attempt(rank) for rank in range(self._world_size))

    def _did(self, rank: int, step: int) -> bool:
        lines = self._lines_of_attempt(rank)
        return any(int(line.partition('"step": ')[2].partition(",")[0]) >= step for line in lines)

    def _size(self, rank: int) -> int:
        path = self.notes / f"rank{rank}.jsonl"
        return path.stat().st_size if path.exists() else 0

    def _lines_of_attempt(self, rank: int, most: int = 16384) -> list[str]:
        """What it wrote down last, as far as these bytes tell."""
        size = self._size(rank)
        if size <= self._begins[rank]:
            return []
        with (self.notes / f"rank{rank}.jsonl").open("rb") as file:
            file.seek(max(self._begins[rank], size - most))
            lines = file.read().decode().splitlines()
        return [line for line in lines if line.startswith(f'{{"attempt": {self.attempts - 1}, "step": ')]

    def note(self, ended: Ended) -> None:
        """Leaks, and how long it took from the end before to a new step."""
        assert leaked(self._before, slack=1) == []
        first = self._first_of_attempt()
        if self._ended is not None and first is not None:
            self.restart_s.append(first - self._ended)
        self._ended = ended.noticed

    def _first_of_attempt(self) -> float | None:
        """When all ranks had done their first step of the attempt that has ended; None if one has not."""
        times = []
        for rank in range(self._world_size):
            if self._size(rank) <= self._begins[rank]:
                return None
            with (self.notes / f"rank{rank}.jsonl").open("rb") as file:
                file.seek(self._begins[rank])
                line = file.readline()
            if not line.endswith(b"\n"):
                return None
            times.append(float(json.loads(line)["at"]))
        return max(times)


def draw_kill(rng: random.Random, step: int) -> Fault:
    """Somewhere in this step or one of the next; what only the first rank does strikes there."""
    point = rng.choice(
        [
            "data.read",
            "step.begin",
            "step.forward",
            "step.gradients",
            "step.reduced",
            "step.updated",
            "weights.gathered",
            "ckpt.snapshot",
            "storage.create",
            "storage.write",
            "storage.fsync",
            "ckpt.before_manifest",
            "ckpt.before_rename",
            "ckpt.after_rename",
            "ckpt.link",
            "ckpt.link_swap",
        ]
    )
    # without ZeRO only the first rank has something to write
    first_only = point.startswith(("ckpt.", "storage.")) and point != "ckpt.snapshot"
    return Fault(point, "kill", 0 if first_only else rng.randrange(WORLD), step, onward=True)
