"""What stays behind is told, what another program has for a moment is not."""

import threading
from pathlib import Path

import pytest

from tests.faults import leaks
from tests.faults.leaks import Held, leaked

SHARED = Path("/dev/shm")


@pytest.fixture
def segment() -> Path:
    if not SHARED.is_dir():
        pytest.skip("this machine has no /dev/shm")
    return SHARED / "psm_of_a_test_of_leaks"


def test_a_segment_that_stays_is_told(segment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "GRACE_S", 0.3)
    before = Held.now()
    segment.touch()
    try:
        assert leaked(before) == [f"/dev/shm/{segment.name}"]
    finally:
        segment.unlink()


def test_a_segment_that_goes_is_not(segment: Path) -> None:
    before = Held.now()
    segment.touch()
    other = threading.Timer(0.2, segment.unlink)
    other.start()
    assert leaked(before) == []
    other.join()


def test_a_file_left_open_is_told(tmp_path: Path) -> None:
    before = Held.now()
    with (tmp_path / "file").open("wb"):
        assert leaked(before) == ["1 file handles"]
        assert leaked(before, slack=1) == []
    assert leaked(before) == []
