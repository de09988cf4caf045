"""A job that SLURM takes its nodes from again and again is one job: each step once, with the loss it would have had."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from goals import Trials
from ranks import run_on_ranks
from safetensors.torch import load_file

from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import grid_of
from megatron_moe.training.trainer import Trainer
from tests.end_to_end.commands import steps_in, whole_checkpoint, write_recipe
from tests.end_to_end.tiny_job import CPU, GLOBAL_BATCH, job, write_corpus
from tests.house.sources import ROOT
from tests.launch.queue import Queue, Start
from tests.launch.warm import warm_ranks

SCRIPT = ROOT / "examples/launch/slurm.sbatch"
RANKS, INTERVAL = 2, 3
LONG = 1_000_000


def tiny(folder: Path, **training: int) -> RunConfig:
    saving = {"save": str(folder / "saved"), "load": "latest", "save_interval": INTERVAL, "keep": 2}
    return job(
        folder.parent / "tokens",
        training={"train_iters": LONG, **training},
        checkpoint=saving,
        logging={"log_dir": str(folder / "log")},
    )


def train(rank: int, world_size: int, text: str) -> int:
    config = RunConfig.from_json(text)
    return Trainer(config, ParallelState.distributed(grid_of(config, world_size)), CPU).run()


def curve(log_dir: Path) -> list[tuple[int, int, float]]:
    """Step, samples that were read, and loss of each line."""
    lines = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["consumed_samples"], line["loss"]) for line in lines]


class Trouble:
    """Takes a job's nodes once for each trial, then lets its owner cancel it."""

    def __init__(self, trials: Trials, log_dir: Path) -> None:
        self._trials = iter(trials)
        self._log_dir = log_dir
        self.kinds: list[str] = []

    def __call__(self, start: Start) -> bool:
        found = next(self._trials, None)
        kind = found[1].choice(["time is up", "preempted", "at start-up", "a rank is killed"]) if found else "cancelled"
        self.kinds.append(kind)
        if kind == "at start-up":
            self._wait(start, lambda: start.step is not None)
            start.time_is_nearly_up()
            return False
        # a killed rank counts as an attempt that failed, unless it left a newer checkpoint
        steps = INTERVAL + 1 if kind == "a rank is killed" else 1
        before = max(steps_in(self._log_dir), default=0)
        wanted = before + steps + (found[1].randrange(4) if found else 0)
        self._wait(start, lambda: max(steps_in(self._log_dir), default=0) >= wanted)
        self._strike(start, kind, found[1] if found else random.Random(0))
        return kind == "preempted"

    def _strike(self, start: Start, kind: str, rng: random.Random) -> None:
        if kind == "time is up":
            start.time_is_nearly_up()
        elif kind == "a rank is killed":
            os.kill(rng.choice(self._ranks()), signal.SIGKILL)
        else:
            start.preempt()

    def _ranks(self) -> list[int]:
        return [int((self._log_dir.parent / f"rank{rank}").read_text()) for rank in range(RANKS)]

    def _wait(self, start: Start, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not true():
            assert start.process.poll() is None and time.monotonic() < deadline, self.kinds
            time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.goal("R25", ci=20, nightly=100, what="a SLURM job preempted: one log, each step once, same losses")
def test_a_job_that_is_preempted_over_and_over_has_one_continuous_log(tmp_path: Path, trials: Trials) -> None:
    write_corpus(tmp_path / "tokens")
    folder = tmp_path / "job"
    folder.mkdir()
    recipe = write_recipe(folder, tiny(folder))
    trouble, queue = Trouble(trials, folder / "log"), Queue(folder, RANKS)
    with warm_ranks(folder) as python:
        options = ("--python", str(python), "--max-restarts", "1000")
        queue.submit(SCRIPT, *options, "--config", str(recipe), disturb=trouble)
    said = (folder / "job.log").read_text()
    expected = {"time is up": {75}, "preempted": {75}, "cancelled": {75}, "a rank is killed": {86, 137}}
    for kind, code in zip(trouble.kinds, queue.codes, strict=True):
        assert code in expected.get(kind, {75, 86, 138, 143}), (kind, code, said[-4000:])
    assert len(trouble.kinds) == trials.wanted + 1 and "Traceback" not in said

    found = curve(folder / "log")
    last = found[-1][0]
    assert [(step, consumed) for step, consumed, _ in found] == [(n, n * GLOBAL_BATCH) for n in range(1, last + 1)]
    alone = tmp_path / "undisturbed"
    assert run_on_ranks(RANKS, train, tiny(alone, exit_interval=last).to_json()) == [0] * RANKS
    assert found == curve(alone / "log")
    ours, theirs = (whole_checkpoint(place / "saved") for place in (folder, alone))
    assert ours.step == theirs.step == last and ours.state == theirs.state
    for path in theirs.folder.glob("*.safetensors"):
        kept, expected_tensors = load_file(ours.folder / path.name), load_file(path)
        assert kept.keys() == expected_tensors.keys()
        assert all(torch.equal(kept[name], tensor) for name, tensor in expected_tensors.items())
    assert not list((folder / "saved").glob("*.tmp*"))
    trials.notes["steps"] = last


def test_the_stand_in_for_srun_ends_a_rank_that_waits_for_one_that_has_ended(tmp_path: Path) -> None:
    queue = Queue(tmp_path, RANKS)
    work = "[[ $SLURM_PROCID == 1 ]] && exec sleep 1000; exit 3"
    began = time.monotonic()
    srun = subprocess.run(["srun", "--wait=1", "bash", "-c", work], env=queue.environment, timeout=60, check=False)
    assert srun.returncode == 128 + signal.SIGKILL and time.monotonic() - began > 1
