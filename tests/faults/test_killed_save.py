"""SIGKILL at any time during a save: what was there can be loaded, and no more than one interval is lost."""

import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from random import Random

import pytest
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.load import Examined, examine
from megatron_moe.checkpoint.rotate import step_folder, stored_steps
from megatron_moe.checkpoint.save import CheckpointWriter
from tests.checkpoint.samples import ALONE, assert_holds_sample, newest, save_sample, save_step
from tests.checkpoint.test_ranks import check_load, save_rank, world_of
from tests.end_to_end.tiny_job import CPU
from tests.faults.inject import Faults, FaultyStorage
from tests.faults.leaks import Held, leaked, left_by_saves
from tests.faults.mortal import DONE, FAILED, KILLED, in_child
from tests.faults.plan import CALLS, Fault, FaultPlan
from tests.faults.supervisor import Attempt

SAVES = 3  # of one child: with keep=2 the last of them rotates
COMMIT = ("ckpt.before_manifest", "ckpt.before_rename", "ckpt.after_rename", "ckpt.link", "ckpt.link_swap")
POINTS = (*COMMIT, "ckpt.rotate", "ckpt.remove", *(f"storage.{call}" for call in CALLS))


class Progress:
    """What a child tells of its saves before it dies: a byte each, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(b"")

    def tell(self, step: int) -> None:
        with self._path.open("ab", buffering=0) as file:
            file.write(bytes([step]))

    @property
    def last(self) -> int:
        told = self._path.read_bytes()
        return told[-1] if told else 0


def save_all(writer: CheckpointWriter, began: Progress, saved: Progress) -> None:
    """Steps 2, 3, 4; the interval between two of them is longer than it takes to write one."""
    for step in range(2, 2 + SAVES):
        began.tell(step)
        save_step(writer, step)
        while writer.last_step != step:
            writer.commit_if_ready()
            time.sleep(0.0002)
        saved.tell(step)
    writer.finish()


def saves(root: Path, plan: FaultPlan, began: Progress, saved: Progress, background: bool) -> None:
    """The work of a child."""
    storage = FaultyStorage(Faults(plan, 0))
    save_all(CheckpointWriter(root, ALONE, 2, "run", storage, background=background), began, saved)


def undisturbed_s(whole: Path, folder: Path, background: bool) -> float:
    """How long a child takes that nobody kills."""
    root = folder / "undisturbed"
    shutil.copytree(whole, root, symlinks=True)
    progress = Progress(folder / "began"), Progress(folder / "saved")
    started = time.monotonic()
    assert in_child(partial(saves, root, FaultPlan(), *progress, background), under=root, log=folder / "log") == DONE
    took = time.monotonic() - started
    shutil.rmtree(root)
    return took


def draw(rng: Random, number: int) -> FaultPlan:
    """Every other trial at a named point, in turn; the other half at a random time."""
    if number % 2:
        return FaultPlan()
    point = POINTS[number // 2 % len(POINTS)]
    # each save makes a folder, a link and renames a few times; the disk is called more often
    often = {"ckpt.rotate": 1, "ckpt.remove": 6, "storage.remove_dir": 1, "storage.make_dir": 3, "storage.symlink": 3}
    most = often.get(point, 3 if point.startswith("ckpt.") else 6)
    return FaultPlan((Fault(point, "kill", nth=rng.randint(1, most)),))


LOSES = "SIGKILL during a save {}: whole, one interval lost at most"
AT_ONCE = pytest.mark.goal("R2", ci=100, nightly=2000, what=LOSES.format("at once"))
BESIDE = pytest.mark.goal("R2", ci=100, nightly=2000, what=LOSES.format("beside the training"))


@pytest.mark.parametrize(
    "background", [pytest.param(False, marks=AT_ONCE), pytest.param(True, marks=BESIDE)], ids=["at once", "beside"]
)
@pytest.mark.timeout(7200)
def test_a_kill_during_a_save_loses_at_most_one_interval(background: bool, trials: Trials, tmp_path: Path) -> None:
    before = Held.now()
    whole = tmp_path / "whole"
    save_sample(whole, 1)
    outcomes = {KILLED: 0, DONE: 0}
    usual_s = 0.0
    for number, rng in trials:
        root = tmp_path / str(number)
        shutil.copytree(whole, root, symlinks=True)
        plan = draw(rng, number)
        if not plan.faults:
            # the whole of it, so that kills are spread over all of its time; how long it takes depends on the machine
            usual_s = usual_s or undisturbed_s(whole, tmp_path, background)
        after = None if plan.faults else rng.uniform(0, usual_s)
        began, saved = Progress(tmp_path / "began"), Progress(tmp_path / "saved")
        work = partial(saves, root, plan, began, saved, background)
        outcome = in_child(work, after_s=after, under=root, log=tmp_path / "log")
        assert outcome != FAILED, (str(plan), (tmp_path / "log").read_text())
        outcomes[outcome] += 1
        check(root, began.last, saved.last)
        shutil.rmtree(root)
    assert outcomes[KILLED] > trials.done // 2, outcomes
    assert leaked(before) == []


def check(root: Path, began: int, saved: int) -> None:
    """The newest is whole and late enough; the next start saves as ever and leaves nothing lying about."""
    found = newest(root)
    assert_holds_sample(found)
    assert found.step >= max(1, saved, began - 1), (found.step, began, saved)
    save_sample(root, 9, keep=2)
    assert_holds_sample(newest(root))
    assert newest(root).step == 9 and left_by_saves(root) == []
    assert os.readlink(root / "latest") == "step_00000009"


def save_together(rank: int, world_size: int, root: str, line: str, background: bool) -> int:
    """Two ranks, half of each tensor each; one of them dies."""
    storage = FaultyStorage(Faults(FaultPlan.parse(line), rank))
    writer = CheckpointWriter(Path(root), world_of(world_size), 2, "run", storage, background=background)
    for step in (2, 3, 4):
        save_rank(writer, rank, world_size, step)
    writer.finish()
    return 0


@pytest.mark.goal("R2", ci=10, nightly=200, what="SIGKILL to one of two ranks that save together")
@pytest.mark.timeout(7200)
def test_a_kill_of_one_of_two_ranks_during_a_save(trials: Trials, tmp_path: Path) -> None:
    before = Held.now()
    for number, rng in trials:
        root = tmp_path / str(number)
        rank = number % 2
        # the second rank writes tensors only
        point = rng.choice(("storage.create", "storage.write", "storage.fsync") if rank else POINTS[:6])
        # of three saves one alone rotates
        line = str(Fault(point, "kill", rank, nth=1 if point == "ckpt.rotate" else rng.randint(1, 3)))
        ended = Attempt(2, tmp_path / "log", save_together, str(root), line, number // 2 % 2 == 0).wait(300)
        assert ended is not None and ended.codes[rank] == -signal.SIGKILL, (line, ended)
        for step in stored_steps(root):
            found = examine(step_folder(root, step), step, ALONE, CPU, "xxh3")
            assert isinstance(found, Examined), (line, found)  # what is visible is whole
        again = Attempt(2, tmp_path / "log", save_together, str(root), "", number // 2 % 2 == 0).wait(300)
        assert again is not None and again.code == 0
        assert run_on_ranks(1, check_load, root) == [4] and left_by_saves(root) == []
    assert leaked(before) == []
