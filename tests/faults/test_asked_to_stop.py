"""A signal at any time, to any rank: one step at most, a checkpoint, 75 on all ranks; and the next start goes on."""

import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.load import Examined, examine
from megatron_moe.checkpoint.rotate import step_folder, stored_steps
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training import signals
from megatron_moe.training.engine import grid_of
from megatron_moe.training.trainer import Trainer
from tests.checkpoint.samples import ALONE
from tests.end_to_end.tiny_job import CPU, attempt, job, read_steps, watch, write_corpus
from tests.faults.inject import Faults, attach
from tests.faults.leaks import Held, leaked, left_by_saves
from tests.faults.mortal import KILLED, in_child
from tests.faults.plan import SIGNALS, Fault, FaultPlan

WORLD, LONG = 2, 100_000
ON_ALL = ("load.begin", "load.end", "data.read", "step.begin", "step.forward", "step.gradients", "step.reduced")
FIRST_ONLY = ("storage.write", "ckpt.before_manifest", "ckpt.before_rename", "ckpt.after_rename", "ckpt.rotate")
POINTS = (*ON_ALL, "step.updated", "weights.gathered", "eval.begin", "eval.batch", "ckpt.snapshot", *FIRST_ONLY)


@dataclass(frozen=True)
class Request:
    """One start of the job, and how it is asked to stop: a fault, or after some time (the file: on the first rank)."""

    line: str
    after_s: float | None
    by: str
    rank: int
    workers: int
    background: bool


@dataclass(frozen=True)
class Answer:
    """What one rank saw of it."""

    code: int
    first: int
    step: int
    struck: int | None  # the step in which it was asked, if that is known here
    reason: str


def draw(rng: Random, number: int) -> Request:
    """In turn a signal at a named point, and a signal or the file at a random time."""
    by = rng.choice(["TERM", "USR1", "INT"])
    rank, workers, background = rng.randrange(WORLD), number % 5, rng.random() < 0.5
    if number % 2 == 0:
        point = POINTS[number // 2 % len(POINTS)]
        rank = 0 if point in FIRST_ONLY else rank
        line = str(Fault(point, by, rank, nth=rng.randint(1, 2 if point.startswith(("eval", "ckpt")) else 4)))
        # a start looks for a checkpoint once
        line = line.partition(",nth")[0] if point.startswith("load") else line
        return Request(line, None, by, rank, workers, background)
    by = rng.choice([by, "file"])
    return Request("", rng.uniform(0, 0.25), by, 0 if by == "file" else rank, workers, background)


def configuration(corpus: Path, folder: Path, request: Request) -> str:
    saving = {"save": str(folder / "saved"), "load": "latest", "save_interval": 2, "keep": 2}
    return job(
        corpus,
        data={"num_workers": request.workers},
        training={
            "train_iters": LONG,
            "eval_interval": 3,
            "eval_iters": 2,
            "kill_switch_file": str(folder / "stop"),
        },
        checkpoint={**saving, "async_save": request.background},
        logging={"log_interval": LONG},
    ).to_json()


def answer(rank: int, world_size: int, texts: list[str], requests: list[Any], notes: str) -> list[dict[str, Any]]:
    """Start after start in one process; what this rank saw of each."""
    answers = []
    state = ParallelState.distributed(grid_of(RunConfig.from_json(texts[0]), world_size))
    for number, (text, asked) in enumerate(zip(texts, requests, strict=True)):
        request = Request(**asked)
        config = RunConfig.from_json(text)
        switch = Path(config.training.kill_switch_file or "")
        if rank == 0:
            switch.unlink(missing_ok=True)
        state.world.comm.barrier()
        trainer = Trainer(config, state, CPU)
        faults = Faults(FaultPlan.parse(request.line), rank)
        attach(trainer, faults)
        struck: list[int] = []
        timer = ask_later(trainer, request, switch, struck) if request.rank == rank else None
        with (Path(notes) / f"rank{rank}.jsonl").open("ab", buffering=0) as file:
            watch(trainer, file.write, number)
            code = trainer.run()
        if timer is not None:
            timer.join()
        struck += [step for _, step in faults.struck]
        first = trainer.first_step
        answers.append(asdict(Answer(code, first, trainer.step, struck[0] if struck else None, request.by)))
    return answers


def ask_later(trainer: Trainer, request: Request, switch: Path, struck: list[int]) -> threading.Thread | None:
    """A thread that asks this process after a while, once it can be asked."""
    if request.after_s is None:
        return None

    def ask() -> None:
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            time.sleep(0.001)
        time.sleep(request.after_s or 0.0)
        struck.append(trainer.step + 1)
        if request.by == "file":
            switch.touch()
        else:
            os.kill(os.getpid(), SIGNALS[request.by])

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.mark.goal(
    "R24",
    ci=50,
    nightly=500,
    what="TERM, USR1, INT or the file at any time, 0-4 data workers: one step, a checkpoint, 75 on all ranks",
)
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_job_that_is_asked_to_stop(trials: Trials, tmp_path: Path) -> None:
    before = Held.now()
    corpus = write_corpus(tmp_path / "tokens", documents=200)
    requests = [draw(rng, number) for number, rng in trials]
    trials.done = 0  # drawn, not done
    texts = [configuration(corpus, tmp_path, request) for request in requests]
    (tmp_path / "notes").mkdir()
    asked = [asdict(request) for request in requests]
    answers = run_on_ranks(WORLD, answer, texts, asked, str(tmp_path / "notes"))
    last = 0
    for number, request in enumerate(requests):
        told = [Answer(**found[number]) for found in answers]
        assert {found.code for found in told} == {75}, (number, request, told)
        assert {(found.first, found.step) for found in told} == {(last, told[0].step)}, (number, request, told)
        (struck,) = [found.struck for found in told if found.struck is not None]
        assert told[0].step <= max(struck, last) + 1, (number, request, told)
        last = told[0].step
        trials.add(1)
    steps = read_steps(tmp_path / "notes", WORLD)
    assert [step.step for step in steps] == list(range(1, last + 1)), "no step is left out, none done twice"
    assert stored_steps(tmp_path / "saved")[0] == last and left_by_saves(tmp_path / "saved") == []
    assert isinstance(examine(step_folder(tmp_path / "saved", last), last, ALONE, CPU, "xxh3"), Examined)
    whole = job(corpus, training={"train_iters": LONG, "exit_interval": last}, logging={"log_interval": LONG})
    (tmp_path / "whole").mkdir()
    assert run_on_ranks(WORLD, attempt, whole.to_json(), str(tmp_path / "whole"), 0, None) == [0, 0]
    expected = [(step.step, step.state) for step in read_steps(tmp_path / "whole", WORLD)]
    assert [(step.step, step.state) for step in steps] == expected
    trials.notes["steps"] = last
    assert leaked(before) == []


@pytest.mark.parametrize("kind", ["TERM", "USR1", "INT"])
def test_a_second_request_ends_it_at_once(kind: str, tmp_path: Path) -> None:
    """In the middle of a step that would take an hour."""
    config = job(write_corpus(tmp_path / "tokens"), checkpoint={"save": str(tmp_path / "saved")})

    def work() -> None:
        signals.ECHO_SECONDS = 0.0
        trainer = Trainer(config, ParallelState.alone(), CPU)
        pid = os.getpid()
        trainer.engine.train_step = lambda *_: time.sleep(3600)  # type: ignore[assignment,return-value]

        def ask_twice() -> None:
            while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                time.sleep(0.001)
            os.kill(pid, SIGNALS[kind])
            time.sleep(0.3)
            os.kill(pid, SIGNALS[kind])

        threading.Thread(target=ask_twice, daemon=True).start()
        trainer.run()

    assert in_child(work, under=tmp_path, log=tmp_path / "log") == KILLED
