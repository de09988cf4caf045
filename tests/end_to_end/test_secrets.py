"""Secrets of the environment stay there: no file, no output and no report of a run holds one, however it ends."""

import os
from pathlib import Path

import pytest
from goals import Trials

from tests.end_to_end.commands import call, write_recipe
from tests.end_to_end.tiny_job import job, write_corpus

NAMES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN")
LONG = 1_000_000
# arguments of a run, and the exit code that it ends with
ENDS: dict[str, tuple[tuple[str, ...], int]] = {
    "finished": (("--exit-interval", "3"), 0),
    "resumed": (("--exit-interval", "5"), 0),
    "usage": (("--lr", "-1"), 2),
    "other run": (("--seed", "77"), 2),
    "not finite": (("--lr", "1e38", "--lr-warmup-iters", "0"), 16),
    "no checkpoint": (("--ckpt-step", "4000"), 64),
    "no corpus": (("--data-path", "/nowhere/at all"), 65),
}


def found_in(folder: Path, said: str, secret: str) -> list[str]:
    """The files below a folder that hold it, and the output."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    found = [str(path) for path in files if secret.encode() in path.read_bytes() or secret in path.name]
    return found + ["the output"] * (secret in said)


@pytest.mark.goal("R39", ci=35, nightly=35, what="5 secrets in the environment, 7 ends of a run: nowhere written")
def test_no_secret_leaves_the_environment(
    tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets = {name: f"canary-{number}-{os.urandom(8).hex()}" for number, name in enumerate(NAMES)}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    config = job(
        write_corpus(tmp_path / "tokens"),
        training={"train_iters": LONG},
        checkpoint={"save": str(tmp_path / "saved"), "load": "latest"},
        logging={"log_dir": str(tmp_path / "log"), "tensorboard_dir": str(tmp_path / "board")},
    )
    recipe = str(write_recipe(tmp_path, config))
    for end, (arguments, code) in ENDS.items():
        assert call("--config", recipe, *arguments) == code, end
        out, err = capfd.readouterr()
        for name, secret in secrets.items():
            assert not found_in(tmp_path, out + err, secret), (end, name)
            trials.add(1)
    assert len(list(tmp_path.rglob("*"))) > 10


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"\x00before secret after")
    assert found_in(tmp_path, "", "secret") == [str(tmp_path / "a" / "file")]
    assert found_in(tmp_path, "a secret", "other") == []
    assert found_in(tmp_path / "b", "a secret", "secret") == ["the output"]
