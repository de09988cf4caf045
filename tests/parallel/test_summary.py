"""torchrun's own reader finds our paragraph, and says it in its summary."""

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_moe.config.errors import ConfigError
from megatron_moe.parallel.summary import note_for_torchrun
from megatron_moe.pretrain import main

TEXT = "--lr -1 is no number above 0;\nuse 1e-3."


def summary(file: Path) -> str:
    return str(ChildFailedError("job", {0: ProcessFailure(0, 7, ConfigError.exit_code, str(file))}))


def test_the_summary_names_the_error_and_not_the_documentation(tmp_path: Path) -> None:
    assert "pytorch.org" in summary(tmp_path / "error.json")
    note_for_torchrun(TEXT, {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")})
    said = summary(tmp_path / "error.json")
    assert "traceback : --lr -1 is no number above 0;\n  use 1e-3." in said and "pytorch.org" not in said
    assert "exitcode  : 2" in said


def test_without_torchrun_and_without_a_place_nothing_is_written(tmp_path: Path) -> None:
    note_for_torchrun(TEXT, {})
    note_for_torchrun(TEXT, {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "gone" / "error.json")})
    assert list(tmp_path.iterdir()) == []


def test_the_program_writes_it_on_each_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first one speaks for it on stderr
    assert main(["--lr", "-1"]) == ConfigError.exit_code
    assert capsys.readouterr().err == ""
    message = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert message.startswith("--lr -1")
