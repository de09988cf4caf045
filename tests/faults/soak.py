"""A job that trains under one fault after another with nobody watching:  bash tests/faults/soak.sh --minutes 30

What must hold: it gets on, every step has the hash of the undisturbed run's, nothing leaks. JSON tells of it.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.rotate import step_folder, stored_steps
from tests.end_to_end.tiny_job import Step, job, write_corpus
from tests.faults.conditions import conditions
from tests.faults.leaks import Held, leaked, left_by_saves
from tests.faults.mix import faults
from tests.faults.plan import ERRNOS, Fault
from tests.faults.runs import LIMIT_S, Run
from tests.faults.slope import Growth
from tests.faults.supervisor import FINISHED, PREEMPTED, Attempt, Ended
from tests.faults.table import soak_table

LONG = 1_000_000  # steps: the clock ends the run
SAVE_INTERVAL, KEEP = 10, 3
PACE_S = 0.05  # of a step: so that the undisturbed run, which does not wait, takes less time


@dataclass
class Soak:
    """What is asked for."""

    minutes: float
    ranks: int
    every_s: float
    seed: int


@dataclass
class Found:
    """What happened."""

    struck: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    lost_steps: list[int] = field(default_factory=list)  # done again after each restart
    hung: int = 0
    supervisor: Growth = field(default_factory=Growth)
    ranks: Growth = field(default_factory=Growth)
    problems: list[str] = field(default_factory=list)


class Soaking:
    """The job, and whoever starts it again."""

    def __init__(self, wanted: Soak, folder: Path) -> None:
        self.wanted = wanted
        self.found = Found()
        self.rng = random.Random(f"soak {wanted.seed}")
        self.folder = folder
        self.inbox = folder / "fault"
        self.corpus = write_corpus(folder / "tokens", documents=400)
        self.run = Run(folder / "run", self.text(folder / "run" / "saved"), wanted.ranks)
        self.began = time.monotonic()

    def text(self, saved: Path | None, **training: Any) -> str:
        saving: dict[str, Any] = {}
        if saved is not None:
            saving = {"save": str(saved), "load": "latest", "save_interval": SAVE_INTERVAL, "keep": KEEP}
            saving["max_restarts_without_progress"] = None
        router = {"router_type": "deepseek_v3", "aux_loss_coeff": 0.0}
        options = {"train_iters": LONG, **training}
        return job(
            self.corpus, moe=router, checkpoint=saving, training=options, logging={"log_interval": LONG}
        ).to_json()

    def go(self) -> None:
        """Until the time is over; then the job is asked to stop."""
        held = Held.now()
        kinds, rng = faults(self.rng), self.rng
        until = self.began + 60 * self.wanted.minutes
        running = self._start()
        for number in range(1, 1 + int(60 * self.wanted.minutes / self.wanted.every_s)):
            at = min(until, self.began + self.wanted.every_s * (number - 1 + rng.uniform(0.2, 0.8)))
            running = self._rest(running, at)
            self._strike(next(kinds), running)
            running = self._rest(running, min(until, self.began + self.wanted.every_s * number))
        running = self._trained(running)
        running.send(signal.SIGTERM)
        ended = running.wait(LIMIT_S)
        assert ended is not None and ended.code == PREEMPTED, (ended, self.run.said())
        self._note(ended)
        self.found.problems += leaked(held)

    def _start(self) -> Attempt:
        self.inbox.unlink(missing_ok=True)
        return self.run.start(pace_s=PACE_S, inbox=self.inbox)

    def _rest(self, running: Attempt, until: float) -> Attempt:
        """Watch until then; an attempt that ends is started again at once."""
        while (left := until - time.monotonic()) > 0:
            ended = running.wait(min(left, 1.0))
            self._measure(running)
            if ended is not None:
                self._note(ended)
                running = self._start()
        return running

    def _trained(self, running: Attempt) -> Attempt:
        """The same once this attempt has done a step: one that was asked to stop earlier has nothing to save."""
        limit = time.monotonic() + LIMIT_S
        while not self.run.has_begun():
            assert time.monotonic() < limit, self.run.said()
            running = self._rest(running, time.monotonic() + 0.2)
        return running

    def _strike(self, kind: str, running: Attempt) -> None:
        self.found.struck[kind] += 1
        rank = self.rng.randrange(self.wanted.ranks)
        if kind in ("raise", "disk"):
            self._hand_in(kind, rank)
        elif kind == "preempt":
            running.send(signal.SIGTERM)
        elif kind == "stop":
            running.send(signal.SIGSTOP, rank)
        else:
            if kind == "flip":
                self._flip_a_bit()
            running.send(signal.SIGKILL, rank)

    def _hand_in(self, kind: str, rank: int) -> None:
        if kind == "raise":
            points = ["step.forward", "step.gradients", "step.reduced", "step.updated", "data.read", "ckpt.snapshot"]
            fault = Fault(self.rng.choice(points), "raise", rank)
        else:
            fault = Fault("storage.any", self.rng.choice(list(ERRNOS)), rank=0, nth=self.rng.randint(1, 60))
        spare = self.inbox.with_name("spare")
        spare.write_text(str(fault))
        spare.rename(self.inbox)

    def _flip_a_bit(self) -> None:
        """Of any file of the newest checkpoint, as far as there are two of them."""
        steps = stored_steps(self.run.saved)
        if len(steps) < 2:
            return
        files = sorted(path for path in step_folder(self.run.saved, steps[0]).iterdir() if path.stat().st_size)
        path = self.rng.choice(files)
        position = self.rng.randrange(path.stat().st_size)
        with path.open("r+b") as file:
            (value,) = os.pread(file.fileno(), 1, position)
            os.pwrite(file.fileno(), bytes([value ^ (1 << self.rng.randrange(8))]), position)

    def _measure(self, running: Attempt) -> None:
        now = time.monotonic() - self.began
        self.found.supervisor.add(now, os.getpid())
        for process in running.processes[:1]:
            # young ranks still grow: only those that have trained for a while are compared
            if process.pid is not None and self.run.steps_of_attempt() >= 2 * SAVE_INTERVAL:
                self.found.ranks.add(now, process.pid)

    def _note(self, ended: Ended) -> None:
        self.found.codes[ended.code] += 1
        self.found.hung += len(ended.hung)
        if ended.code == FINISHED:
            self.found.problems.append("the job came to its end before the time was over")
        self.run.note(ended)


def compare(soaking: Soaking) -> tuple[list[Step], list[str]]:
    """The steps of the disturbed run, and how they differ from those of the undisturbed one."""
    steps = soaking.run.steps()
    last = max(step.step for step in steps)  # an attempt that was killed may have been further than the last one
    whole = Run(soaking.folder / "whole", soaking.text(None, exit_interval=last), soaking.wanted.ranks)
    whole.finish(limit_s=3600)
    expected = {step.step: step for step in whole.steps()}
    wrong = [step for step in steps if step != _like(expected[step.step], step.attempt)]
    problems = [f"step {step.step} of attempt {step.attempt} differs" for step in wrong[:5]]
    if sorted(expected) != sorted({step.step for step in steps}):
        problems.append("steps are missing")
    return steps, problems


def _like(step: Step, attempt: int) -> Step:
    return Step(attempt, step.step, step.samples, step.consumed, step.loss, step.state)


def again(steps: Sequence[Step]) -> int:
    """Steps that were done more than once."""
    return len(steps) - len({step.step for step in steps})


def report(soaking: Soaking, seconds: float, steps: Sequence[Step], problems: Sequence[str]) -> dict[str, Any]:
    found, waits = soaking.found, soaking.run.restart_s
    problems = [*found.problems, *problems, *(f"left: {name}" for name in left_by_saves(soaking.run.saved))]
    if found.supervisor.handles_grew:
        problems.append("the supervisor's file handles grew")
    return {
        "soak": True,
        "seed": soaking.wanted.seed,
        "minutes": round(seconds / 60, 2),
        "ranks": soaking.wanted.ranks,
        "every (s)": soaking.wanted.every_s,
        "faults": dict(sorted(found.struck.items())),
        "attempts": soaking.run.attempts,
        "ended with": {str(code): number for code, number in sorted(found.codes.items())},
        "ranks that stood still": found.hung,
        "damaged checkpoints passed over": soaking.run.log().count("newer checkpoints are broken"),
        "steps": steps[-1].step,
        "steps done again": again(steps),
        "median from an end to the next step (s)": round(statistics.median(waits), 2) if waits else None,
        "longest (s)": round(max(waits), 2) if waits else None,
        "state": steps[-1].state,
        "same as undisturbed": not problems,
        "problems": problems,
        "supervisor": found.supervisor.said(),
        "rank 0": found.ranks.said(),
        **conditions(),
    }


def soak(wanted: Soak, folder: Path) -> dict[str, Any]:
    """All of it, in an empty folder; returns what the JSON tells."""
    soaking = Soaking(wanted, folder)
    soaking.go()
    seconds = time.monotonic() - soaking.began
    steps, problems = compare(soaking)
    return report(soaking, seconds, steps, problems)


def main(argv: Iterator[str] | Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="soak.sh", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to disturb it; default 30")
    parser.add_argument("--ranks", type=int, default=4, choices=(1, 2, 4), help="default 4")
    parser.add_argument("--every", type=float, default=20.0, metavar="SECONDS", help="between faults; default 20")
    parser.add_argument("--fault-seed", type=int, default=0, metavar="N", help="which faults, and when; default 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what happened")
    given = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Soak(given.minutes, given.ranks, given.every, given.fault_seed), Path(folder))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(soak_table(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
