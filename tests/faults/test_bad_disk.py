"""The disk of a running job fills up, fails or lies, at every call of a save: it trains on, and saves the next time."""

import ctypes
import errno
import json
import logging
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from goals import Trials

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.errors import StorageError
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.trainer import Trainer
from tests.checkpoint.samples import ALONE, assert_holds_sample, newest, save_sample, save_step
from tests.end_to_end.tiny_job import CPU, job, state_hash, write_corpus
from tests.faults.inject import Faults, attach
from tests.faults.leaks import left_by_saves
from tests.faults.mortal import DONE, in_child
from tests.faults.plan import OF_WRITES, Fault, FaultPlan

SAVES_BEFORE = 3  # from then on each save is as long as the next: it also removes an old checkpoint
LONG = 100_000


class Job:
    """A job of one rank whose every second save, from the fourth on, meets the next of these faults."""

    def __init__(self, corpus: Path, folder: Path, faults: list[tuple[str, int]], *, background: bool = False) -> None:
        self.saved = folder / "saved"
        saving = {"save": str(self.saved), "save_interval": 1, "keep": 2, "async_save": background}
        first = SAVES_BEFORE + 1
        self.steps = SAVES_BEFORE + 2 * len(faults)
        training = {"train_iters": LONG, "exit_interval": self.steps}
        self.config = job(corpus, checkpoint=saving, training=training, logging={"log_interval": LONG})
        self.trainer = Trainer(self.config, ParallelState.alone(), CPU)
        at = [(kind, first + 2 * number, nth) for number, (kind, nth) in enumerate(faults)]
        made = [Fault(point_of(kind), kind, step=step, nth=nth) for kind, step, nth in at]
        self.faults = Faults(FaultPlan.of(made), 0)
        attach(self.trainer, self.faults)
        # by step: what the save ended with, and the newest whole one
        self.seen: dict[int, tuple[StorageError | None, int]] = {}
        self._watch_saves()

    def _watch_saves(self) -> None:
        save = self.trainer._save

        def watched(last: bool) -> None:
            save(last)
            writer = self.trainer.writer
            assert writer is not None
            writer.finish()
            error = writer.last_error
            assert error is None or isinstance(error, StorageError)
            self.seen[self.trainer.step] = error, find_checkpoint(self.saved, None, ALONE).step

        self.trainer._save = watched  # type: ignore[method-assign]


def point_of(kind: str) -> str:
    return "storage.write" if kind in OF_WRITES else "storage.any"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


@pytest.fixture(scope="module")
def calls(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Calls to the disk of one save: all of them, and writes."""
    counted = []
    for saves in (0, 1):
        watched = Job(corpus, tmp_path_factory.mktemp("counted"), [("short", 1000)] * saves)
        assert watched.trainer.run() == 0
        counted.append({point: watched.faults.reached[point] for point in ("storage.any", "storage.write")})
    return {point: (counted[1][point] - counted[0][point]) // 2 for point in counted[0]}


GOALS = {"R5": ("ENOSPC", "EDQUOT"), "R6": ("EIO", "EROFS", "ESTALE", "short", "cut")}
# each kind at all calls of a save, some fifty of which a seventh are writes
MANY = {"R5": (100, 400), "R6": (160, 640)}


def marked(goal: str) -> object:
    what = f"{', '.join(GOALS[goal])} at every call of a save of a running job: it trains on, the next save is whole"
    return pytest.param(goal, marks=pytest.mark.goal(goal, ci=MANY[goal][0], nightly=MANY[goal][1], what=what))


@pytest.mark.parametrize("goal", [marked(goal) for goal in GOALS])
@pytest.mark.timeout(1200)
def test_a_bad_disk_costs_a_running_job_at_most_that_save(
    goal: str, trials: Trials, corpus: Path, calls: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert calls["storage.any"] > 40 and calls["storage.write"] > 5
    faults = [(kind, k) for kind in GOALS[goal] for k in range(1, calls[point_of(kind)] + 1)]
    while trials.done < trials.wanted:
        background = (goal == "R6") == (trials.done < len(faults))  # the second time round the other way
        folder = tmp_path / str(trials.done)
        folder.mkdir()
        watched = Job(corpus, folder, faults, background=background)
        with caplog.at_level(logging.ERROR):
            assert watched.trainer.run() == 0
        check(watched, faults)
        if goal == "R5" and trials.done == 0:
            assert state_hash(watched.trainer) == undisturbed(corpus, watched.steps)
        trials.add(len(faults))
    trials.notes["calls of a save"] = calls["storage.any"]


def check(watched: Job, faults: list[tuple[str, int]]) -> None:
    """Each fault struck; a save that failed says why and leaves the one before, and the next is as ever."""
    assert len(watched.faults.struck) == len(faults)
    failed = 0
    for number, (kind, _) in enumerate(faults):
        step = SAVES_BEFORE + 1 + 2 * number
        (error, whole), (after, whole_after) = watched.seen[step], watched.seen[step + 1]
        # when the last sync fails the checkpoint is there, but its name may not outlive a power cut
        assert whole == step or (error is not None and whole == step - 1), (kind, error)
        assert (after, whole_after) == (None, step + 1), (kind, after)
        if error is not None:
            failed += 1
            told = str(error)
            assert str(watched.saved) in told
            lies = kind == "cut"
            assert "were written" in told if lies else "this save needs" in told and "bytes are free" in told, told
            assert "needs 0 bytes" not in told
    assert failed > len(faults) // 3
    assert left_by_saves(watched.saved) == []


def undisturbed(corpus: Path, steps: int) -> str:
    """The hash of the state after so many steps, without a disk."""
    config = job(corpus, training={"train_iters": LONG, "exit_interval": steps}, logging={"log_interval": LONG})
    trainer = Trainer(config, ParallelState.alone(), CPU)
    assert trainer.run() == 0
    return state_hash(trainer)


def save_until_it_works(root: Path, said: Path, more_room: Callable[[], None]) -> None:
    """Step 2 meets a full disk, step 3 does not."""
    writer = CheckpointWriter(root, ALONE, None, "run", background=False)
    save_step(writer, 2)
    told = [str(writer.last_error or "")]
    assert_holds_sample(newest(root))
    told.append(str(newest(root).step))
    more_room()
    save_step(writer, 3)
    assert newest(root).step == 3 and writer.last_error is None
    assert_holds_sample(newest(root))
    said.write_text(json.dumps(told))


@pytest.mark.goal("R5", ci=30, nightly=300, what="files may not grow beyond a limit of the system: told, and kept")
def test_a_limit_of_the_system(trials: Trials, tmp_path: Path) -> None:
    refused = 0
    for number, rng in trials:
        root, said = tmp_path / str(number), tmp_path / "said"
        save_sample(root, 1)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def work(root: Path = root, said: Path = said, limit: int = rng.randrange(1, 3000), hard: int = hard) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            save_until_it_works(root, said, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)))

        assert in_child(work, under=root, log=tmp_path / "log") == DONE, (tmp_path / "log").read_text()
        problem, step = json.loads(said.read_text())
        assert step == ("1" if problem else "2")
        if problem:
            refused += 1
            assert "File too large" in problem and str(root) in problem
    assert refused > trials.done // 3


CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def mount_small_disk(folder: Path, num_bytes: int) -> bool:
    """A file system in memory for this process alone; False where that is not allowed."""
    system = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if system.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        return False
    for name, text in (("uid_map", f"0 {user} 1"), ("setgroups", "deny"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    options = f"size={num_bytes}".encode()
    return bool(system.mount(b"none", str(folder).encode(), b"tmpfs", 0, options) == 0)


@pytest.mark.parametrize("pages", [1, 3, 4])
def test_a_disk_that_is_really_full(pages: int, tmp_path: Path) -> None:
    disk, said = tmp_path / "disk", tmp_path / "said"
    disk.mkdir()

    def work() -> int:
        if not mount_small_disk(disk, 32 * 4096):
            return 0
        filler = disk / "filler"
        save_sample(disk / "root", 1)
        free = os.statvfs(disk)
        filler.write_bytes(bytes((free.f_bavail - pages) * free.f_bsize))
        save_until_it_works(disk / "root", said, filler.unlink)
        return 0

    assert in_child(work, under=disk, log=tmp_path / "log") == DONE, (tmp_path / "log").read_text()
    if not said.exists():
        pytest.skip("no file system may be mounted here")
    problem, step = json.loads(said.read_text())
    assert step == "1" and os.strerror(errno.ENOSPC) in problem and "this save needs" in problem
