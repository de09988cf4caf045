"""The command that looks after checkpoints, as a person runs it."""

import os
from pathlib import Path

import pytest

from tests.checkpoint.samples import save_sample
from tools import checkpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        save_sample(tmp_path / "runs", step)
    return tmp_path / "runs"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = checkpoint.main([str(word) for word in words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def spoil(root: Path) -> None:
    """Two weights of step 30, far apart, and a cut through the end of its optimizer."""
    folder = root / "step_00000030"
    path = folder / "model-r00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    data[-50] ^= 1
    path.write_bytes(data)
    os.truncate(folder / "optim-r00000.safetensors", (folder / "optim-r00000.safetensors").stat().st_size - 4)


def test_ls_tells_each_step_and_what_would_be_loaded(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "step_00000040.tmp-run-3").mkdir()
    code, out, _ = run(capsys, "ls", root)
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("step 30  0.0 MB  1 rank  run run  0.0 h old  valid")
    assert lines[3] == "step_00000040.tmp-run-3: being written, or left by a save that was cut short"
    assert lines[4] == "--load latest would take step 30, if its checksums hold (--hashes)"
    spoil(root)
    assert "--load latest would take step 20\n" in run(capsys, "ls", root, "--hashes")[1]
    assert run(capsys, "ls", root / "absent")[0] == 64
    (root / "empty").mkdir()
    assert run(capsys, "ls", root / "empty")[0] == 64


def test_verify_names_every_bad_piece(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "verify", root, "--raw-read")
    assert code == 0 and out.count(": good; ") == 3 and "of the speed of reading alone" in out
    spoil(root)
    code, out, err = run(capsys, "verify", root / "latest")
    assert code == 65 and err == f"error: {root}: damaged: step 30.\n"
    lines = out.splitlines()
    for line, tensor in zip(lines, ("w' [0:4, 3:6]", "mask' [0:3]"), strict=False):
        assert line.startswith(f"step_00000030: model-r00000.safetensors: model tensor '{tensor}, bytes ")
    assert all(": its xxh3 is " in line and line.endswith("was written") for line in lines[:2])
    assert "optim-r00000.safetensors has" in lines[2] and "were written" in lines[2]
    assert "optim tensor 'step' [], bytes" in out or "the file ends at byte" in out
    code, out, _ = run(capsys, "verify", root / "step_00000020", "--sha256")
    assert code == 0 and "remark: 2 files have no SHA-256 (--save-sha256): each piece's xxh3-128 was compared" in out
    assert run(capsys, "verify", root / "step_00000077")[0] == 65
    assert run(capsys, "verify", root.parent)[0] == 64


def test_diff_ends_with_1_when_they_differ(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "diff", root / "step_00000010", root)
    assert code == 1 and "state.json samples: 80 / 240" in out and out.endswith(": 5 differences\n")
    code, out, _ = run(capsys, "diff", root, root / "latest")
    assert code == 0 and out.endswith(": equal\n")
    assert run(capsys, "diff", root, root / "step_00000077")[0] == 64


def test_reshard_writes_what_diff_calls_equal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = root.parent / "split"
    code, out, _ = run(capsys, "reshard", root, target, "--ranks", 3)
    assert code == 0 and "as 3 ranks write it: 6 tensors in 6 files" in out
    assert run(capsys, "diff", root, target)[0] == 0
    assert "3 ranks" in run(capsys, "ls", target)[1]
    code, _, err = run(capsys, "reshard", root, target, "--ranks", 1)
    assert code == 2 and "is not overwritten" in err


def test_prune_says_what_goes_before_it_goes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "prune", root, "--keep", 1, "--dry-run")
    assert code == 0 and out == "kept: 30\nwould go: step 20\nwould go: step 10\n"
    (root / "step_00000040.tmp-run-3").mkdir()
    code, out, _ = run(capsys, "prune", root, "--keep", 2, "--stale")
    left = "left as it is, may be being written: step_00000040.tmp-run-3\n"
    assert code == 0 and out == f"kept: 30, 20\n{left}removed: step 10\n"
    assert run(capsys, "prune", root, "--keep", 0)[0] == 2
