"""A file is the old one or the new one at every call to the system at which a kill could fall."""

import errno
import os
from pathlib import Path

import pytest

from megatron_moe.config.whole_file import sync_folder, write_whole


class Killed(BaseException):
    """What a test puts in the place of a kill."""


def test_writes_bytes_and_text(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_whole(path, b"\x00old")
    assert path.read_bytes() == b"\x00old"
    write_whole(path, "né")
    assert path.read_bytes() == b"n\xc3\xa9"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "out.json"
    write_whole(path, "old")

    def kill(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(os, call, kill)
    with pytest.raises(Killed):
        write_whole(path, "new and longer")
    assert path.read_text() == "old"


def test_bytes_are_on_the_disk_before_the_name_and_the_name_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    replace, fsync = os.replace, os.fsync

    def recorded_replace(old: Path, new: Path) -> None:
        calls.append("replace")
        assert Path(old).read_text() == "all of it"
        replace(old, new)

    def recorded_fsync(file: int) -> None:
        calls.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{file}") else "fsync file")
        fsync(file)

    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    write_whole(tmp_path / "out", "all of it")
    assert calls == ["fsync file", "replace", "fsync folder"]


def test_what_a_kill_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("half of a longer one that was cut o")
    write_whole(tmp_path / "out", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "new")]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "new"


def test_a_device_stays_one() -> None:
    write_whole(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_only_folders_that_cannot_be_synced_are_forgiven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if raises:
        with pytest.raises(OSError, match="Input/output"):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)
