"""The command: both directions, and one paragraph with an exit code for what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert.samples import library_model
from tools.convert_checkpoint import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    library_model("qwen3_moe").save_pretrained(tmp_path / "library")
    return tmp_path / "library"


def test_there_and_back_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    ckpt, back = str(tmp_path / "ckpt"), tmp_path / "back"
    assert main(["import", "--hf-folder", str(folder), "--save", ckpt]) == 0
    assert main(["export", "--load", ckpt, "--output", str(back)]) == 0
    assert (back / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_choices_reach_the_folder(folder: Path, tmp_path: Path) -> None:
    ckpt, back = str(tmp_path / "ckpt"), tmp_path / "back"
    assert main(["import", "--hf-folder", str(folder), "--save", ckpt]) == 0
    wanted = [
        "--step",
        "0",
        "--model-type",
        "qwen3_moe",
        "--dtype",
        "bf16",
        "--max-shard-size",
        "20KB",
        "--no-tokenizer",
    ]
    assert main(["export", "--load", ckpt, "--output", str(back), *wanted]) == 0
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(list(back.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["export", "--load", "nowhere", "--output", "hf"], 64, "There is no checkpoint in nowhere"),
        (["export", "--load", "ckpt", "--output", "hf", "--step", "7"], 64, "no checkpoint of step 7"),
        (["export", "--load", "ckpt", "--output", "library"], 2, "exists already and is not overwritten"),
        (
            ["export", "--load", "ckpt", "--output", "hf", "--model-type", "mixtral"],
            2,
            "mixtral cannot express this model",
        ),
        (["export", "--load", "ckpt", "--output", "hf", "--max-shard-size", "much"], 2, "--max-shard-size much"),
        (["export", "--load", "ckpt", "--output", "hf", "--tokenizer-model", "x"], 2, "has no effect"),
        (["import", "--hf-folder", "nowhere", "--save", "other"], 65, "there is no nowhere/config.json"),
        (["import", "--hf-folder", "library", "--save", "ckpt"], 2, "not overwritten"),
    ],
)
def test_errors_are_one_paragraph_with_an_exit_code(
    words: list[str],
    code: int,
    told: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import", "--hf-folder", str(folder), "--save", "ckpt"]) == 0
    capsys.readouterr()
    assert main(words) == code
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert not (tmp_path / "hf").exists()


def test_errors_hold_without_assertions(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-O",
        "-m",
        "tools.convert_checkpoint",
        "import",
        "--hf-folder",
        str(tmp_path),
        "--save",
        "x",
    ]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 65
    assert found.stderr.startswith("error: there is no ")
