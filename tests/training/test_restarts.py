"""Attempts without progress are counted, whatever becomes of the file; after enough of them there is no further one."""

import errno
import json
from pathlib import Path

import pytest
import torch
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.storage import Storage
from megatron_moe.config.checkpoint import CheckpointConfig
from megatron_moe.config.errors import NoProgressError
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.restarts import FILE, Restarts

CPU = torch.device("cpu")
WORLD = ParallelState.alone().world


def restarts(folder: Path, limit: int | None = 3, storage: Storage | None = None) -> Restarts:
    return Restarts(CheckpointConfig(save=str(folder), max_restarts_without_progress=limit), WORLD, storage)


def fail(folder: Path, *, step: int = 4, saved: int | None = None, times: int = 1, limit: int | None = 3) -> None:
    """Attempts that may start, begin after `step`, finish a checkpoint of step `saved`, and are lost."""
    for _ in range(times):
        attempt = restarts(folder, limit)
        attempt.refuse(WORLD, CPU)
        attempt.begin(step)
        attempt.progressed(saved)


def kept(folder: Path) -> dict[str, int] | None:
    found: dict[str, int] | None = json.loads((folder / FILE).read_text()) if (folder / FILE).exists() else None
    return found


def test_the_fourth_attempt_is_refused_with_file_step_number_and_way_out(tmp_path: Path) -> None:
    fail(tmp_path / "saved", times=3)
    assert kept(tmp_path / "saved") == {"attempts": 3, "step": 4}
    with pytest.raises(NoProgressError) as caught:
        fail(tmp_path / "saved")
    assert caught.value.exit_code == 93
    assert str(caught.value) == (
        f"{tmp_path / 'saved' / FILE}: the last 3 attempts, from step 4 on, ended without a newer checkpoint "
        f"(--max-restarts-without-progress 3). Mend what ended them, their logs tell what; then delete this file, "
        f"or raise the number."
    )
    # refused ones are not counted, nor is anything left beside the file
    assert kept(tmp_path / "saved") == {"attempts": 3, "step": 4}
    assert [path.name for path in (tmp_path / "saved").iterdir()] == [FILE]


def test_both_ways_out_lead_out(tmp_path: Path) -> None:
    fail(tmp_path, times=3)
    fail(tmp_path, limit=4)
    with pytest.raises(NoProgressError, match="the last 4 attempts"):
        fail(tmp_path, limit=4)
    (tmp_path / FILE).unlink()
    fail(tmp_path)
    assert kept(tmp_path) == {"attempts": 1, "step": 4}


def test_a_newer_checkpoint_forgets_the_attempts_before(tmp_path: Path) -> None:
    fail(tmp_path, times=2)
    fail(tmp_path, saved=6)
    assert kept(tmp_path) is None
    fail(tmp_path, step=6, times=3)
    with pytest.raises(NoProgressError, match="from step 6 on"):
        fail(tmp_path, step=6)


@pytest.mark.parametrize("saved", [None, 3, 4])
def test_no_checkpoint_and_one_that_is_not_newer_are_no_progress(saved: int | None, tmp_path: Path) -> None:
    fail(tmp_path, saved=saved)
    assert kept(tmp_path) == {"attempts": 1, "step": 4}


def test_starting_further_on_is_progress_and_falling_back_is_none(tmp_path: Path) -> None:
    fail(tmp_path, times=2)
    fail(tmp_path, step=2)
    assert kept(tmp_path) == {"attempts": 3, "step": 2}
    fail(tmp_path, step=4, limit=None)
    assert kept(tmp_path) == {"attempts": 1, "step": 4}


def test_an_end_that_was_meant_forgets_them(tmp_path: Path) -> None:
    fail(tmp_path, times=2)
    last = restarts(tmp_path)
    last.begin(4)
    last.forget()
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_that_never_began_changes_nothing(tmp_path: Path) -> None:
    fail(tmp_path, times=2)
    for _ in range(5):
        restarts(tmp_path).refuse(WORLD, CPU)
    assert kept(tmp_path) == {"attempts": 2, "step": 4}


def test_none_refuses_nothing_and_counts_on(tmp_path: Path) -> None:
    fail(tmp_path, times=7, limit=None)
    assert kept(tmp_path) == {"attempts": 7, "step": 4}


def test_without_a_directory_nothing_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(5):
        attempt = Restarts(CheckpointConfig(), WORLD)
        attempt.refuse(WORLD, CPU)
        attempt.begin(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"attempts": null, "step": 1}', "\0" * 40])
def test_a_broken_file_is_as_none(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_text(text)
    fail(tmp_path)
    assert kept(tmp_path) == {"attempts": 1, "step": 4}
    assert f"cannot read {tmp_path / FILE}" in caplog.text


class Hasty(Storage):
    """A disk that nobody waits for: no power is cut here."""

    def fsync(self, file: int) -> None:
        pass

    def sync_dir(self, path: Path) -> None:
        pass


@pytest.mark.goal("R21", ci=300, nightly=20000, what="crashes, stops and progress: 93 after 3 crashes, else never")
def test_only_crashes_in_a_row_without_progress_are_refused(tmp_path: Path, trials: Trials) -> None:
    for number, rng in trials:
        folder, step, crashes = tmp_path / f"run{number}", 0, 0
        for _ in range(30):
            attempt = restarts(folder, storage=Hasty())
            if crashes == 3:
                with pytest.raises(NoProgressError):
                    attempt.refuse(WORLD, CPU)
                break
            attempt.refuse(WORLD, CPU)
            how = rng.choice(["crash", "crash early", "save and crash", "stop", "stop before the first step"])
            if how in ("crash early", "stop before the first step"):
                continue  # neither trained anything
            attempt.begin(step)
            if how == "crash":
                crashes += 1
                continue
            step, crashes = step + rng.randint(1, 5), 0
            attempt.progressed(step)
            if how == "stop":
                attempt.forget()


class Full(Storage):
    """A disk without room."""

    def write(self, file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_the_count_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fail(tmp_path)
    restarts(tmp_path, storage=Full()).begin(4)
    assert kept(tmp_path) == {"attempts": 1, "step": 4}
    assert "No space left on device; this attempt is not counted" in caplog.text
    fail(tmp_path)  # over what was left half written
    assert kept(tmp_path) == {"attempts": 2, "step": 4}


def start_where_only_the_first_knows(rank: int, world_size: int, folder: str) -> str:
    world = ParallelState.distributed(Grid(world_size)).world
    attempt = Restarts(CheckpointConfig(save=folder if rank == 0 else f"{folder}/elsewhere"), world)
    try:
        attempt.refuse(world, CPU)
    except NoProgressError as error:
        return str(error)
    attempt.begin(4)
    return "began"


def test_the_first_rank_decides_and_counts_for_all(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        assert run_on_ranks(2, start_where_only_the_first_knows, str(tmp_path)) == ["began"] * 2
        assert kept(tmp_path) == {"attempts": number, "step": 4}
    told = run_on_ranks(2, start_where_only_the_first_knows, str(tmp_path))
    assert told[0] == told[1] and told[0].startswith(f"{tmp_path / FILE}: the last 3 attempts")
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
