"""Which checkpoint of a folder is meant; an empty or broken tracker is an error with an exit code, not a silent end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_moe.config.errors import CheckpointError, NoCheckpointError
from megatron_moe.convert.megatron.folder import TRACKER, find_iteration
from tests.convert.megatron.samples import GOLDEN, STEP_FOLDER, copy_of
from tools.convert_checkpoint import main


@pytest.mark.parametrize(
    ("tracker", "code", "told"),
    [
        ("", 65, "is empty: a save was cut off"),
        (" \n", 65, "is empty: a save was cut off"),
        ("seven", 65, "holds 'seven', expected a number"),
        ("-7", 65, "holds '-7'"),
        ("7 8", 65, "holds '7 8'"),
        ("9" * 1000, 65, "holds '999"),
        ("\x00\x00", 65, "expected a number"),
        ("8", 64, "which does not exist; there: iter_0000007"),
        ("release", 64, "which does not exist"),
        (None, 64, "which names the newest checkpoint"),
    ],
)
def test_a_broken_tracker_is_an_error_that_says_what_is_there(
    tracker: str | None, code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of("dense-torch_dist", tmp_path).parent
    (folder / TRACKER).unlink()
    if tracker is not None:
        (folder / TRACKER).write_text(tracker)
    words = ["import-megatron", "--megatron-folder", str(folder), "--save", str(tmp_path / "ckpt"), "--allow-pickle"]
    assert main(words) == code
    error = capsys.readouterr().err
    assert told in error
    assert "iter_0000007" in error
    assert "Traceback" not in error
    assert find_iteration(folder, 7).folder == folder / STEP_FOLDER


def test_the_tracker_the_number_or_the_folder_itself_say_which(tmp_path: Path) -> None:
    root = GOLDEN / "dense-torch-tp2-pp2"
    assert find_iteration(root).folder == find_iteration(root, 7).folder == find_iteration(root / STEP_FOLDER).folder
    assert (find_iteration(root).kind, len(find_iteration(root).pickles)) == ("torch", 4)
    other = find_iteration(GOLDEN / "dense-torch_dist")
    assert other.kind == "torch_dist"
    assert [path.name for path in other.pickles] == [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt"]
    folder = copy_of("dense-torch_dist", tmp_path)
    folder.rename(folder.parent / "release")
    (folder.parent / TRACKER).write_text("release")
    assert find_iteration(folder.parent).folder.name == "release"


def test_what_is_half_or_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match="there is no such folder"):
        find_iteration(tmp_path / "nowhere")
    folder = copy_of("dense-torch_dist", tmp_path)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="lacks .metadata, so its save was cut off"):
        find_iteration(folder)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match="sharded_backend is 'zarr'"):
        find_iteration(folder)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="neither metadata.json"):
        find_iteration(folder.parent)
