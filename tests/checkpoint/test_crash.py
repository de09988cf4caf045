"""Killed at any moment, with a full or failing disk at any call: a whole checkpoint stays, and saving goes on."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.errors import StorageError
from tests.checkpoint.disk_model import play, put_on_disk, read_disk
from tests.checkpoint.samples import (
    ALONE,
    FailingStorage,
    RecordingStorage,
    ShortStorage,
    assert_holds_sample,
    newest,
    save_sample,
    save_step,
)


def broken_newer(root: Path) -> None:
    """Step 2 is there, but damaged: saving it again replaces it."""
    save_sample(root, 2)
    (root / "step_00000002" / "state.json").write_text("{}")


def test_a_run_goes_on_from_every_state_that_a_kill_leaves(tmp_path: Path) -> None:
    root = tmp_path / "real"
    save_sample(root, 1)
    broken_newer(root)
    model = read_disk(root)
    storage = RecordingStorage(root)
    save_sample(root, 2, keep=1, storage=storage)
    for count, operation in enumerate(storage.operations):
        play(model, operation)
        if count % 3:
            continue
        after = tmp_path / "after"
        put_on_disk(model, after)
        save_sample(after, 2, keep=1)
        save_sample(after, 3, keep=1)
        assert sorted(path.name for path in after.iterdir()) == ["latest", "step_00000003"]
        assert_holds_sample(newest(after))
        shutil.rmtree(after)


@pytest.mark.parametrize(
    ("times", "error", "background"),
    [(1, errno.ENOSPC, False), (None, errno.ENOSPC, True), (1, errno.EIO, True), (2, errno.EROFS, False)],
)
def test_a_disk_that_fails_at_any_call_costs_at_most_that_save(
    tmp_path: Path, times: int | None, error: int, background: bool
) -> None:
    outcomes = set()
    for first in range(1, 200):
        root = tmp_path / str(first)
        save_sample(root, 1)
        storage = FailingStorage(first, times, error)
        writer = CheckpointWriter(root, ALONE, 2, "run", storage=storage, background=background)
        save_step(writer, 2)
        writer.finish()
        assert_holds_sample(newest(root))
        if writer.last_error is None:
            assert newest(root).step == 2
        else:
            assert isinstance(writer.last_error, StorageError)
            told = str(writer.last_error)
            assert str(root) in told and "this save needs" in told and "bytes are free" in told
        outcomes.add(writer.last_error is None)
        # the disk is well again: the next start saves as ever
        save_sample(root, 3)
        assert_holds_sample(newest(root))
        assert newest(root).step == 3
        assert not [path for path in root.iterdir() if ".tmp-" in path.name]
        if storage.failures == 0:
            break
    else:
        pytest.fail("the storage never got through")
    assert outcomes == {True, False} and first > 25


def test_a_failed_save_is_logged_and_later_saves_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_sample(tmp_path, 1)
    storage = FailingStorage(5, 1)
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", storage=storage, background=False)
    save_step(writer, 2)
    assert "step 2 was not saved" in caplog.text and "No space left on device" in caplog.text
    # what failed is removed at once, or the disk would stay full
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    save_step(writer, 3)
    assert writer.last_error is None and writer.last_step == 3
    assert newest(tmp_path).step == 3


@pytest.mark.parametrize("part", ["model-", "optim-", "state", "data", "MANIFEST"])
def test_a_file_that_storage_cut_short_is_not_committed(tmp_path: Path, part: str) -> None:
    save_sample(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", storage=ShortStorage(part), background=False)
    save_step(writer, 2)
    assert isinstance(writer.last_error, StorageError)
    assert "were written" in str(writer.last_error)
    assert newest(tmp_path).step == 1


def test_a_root_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    writer = CheckpointWriter(tmp_path / "file" / "root", ALONE, None, "run", background=False)
    save_step(writer, 1)
    assert isinstance(writer.last_error, StorageError)
    assert "step 1 was not saved" in str(writer.last_error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", background=False)
    save_step(writer, 1)
    tmp_path.chmod(0o700)
    assert "Permission denied" in str(writer.last_error)
