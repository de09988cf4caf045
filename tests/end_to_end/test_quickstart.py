"""The README's first command: the whole tour on real text, as a person runs it, without the installation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tour_trains_resumes_exports_and_beats_the_unigram(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "examples/quickstart/tour.py"), "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("exit code 75", "went on with step", "every expert hit", "the whole tour took"):
        assert said in done.stdout
    nats = json.loads((folder / "validation.json").read_text())["nats"]
    assert nats["unigram"] - nats["this model"] >= 0.5
    for left in (
        "log/metrics.jsonl",
        "log/log.txt",
        "loss.png",
        "expert_load.png",
        "hf/config.json",
        "checkpoint/latest",
    ):
        assert (folder / left).exists(), left
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
