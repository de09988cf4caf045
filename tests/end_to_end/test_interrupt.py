"""Ctrl-C at a terminal, which signals all of the foreground's processes at once, leaves a checkpoint and no process."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.end_to_end.commands import PRETRAIN, steps_in, wait_until, whole_checkpoint, write_recipe
from tests.end_to_end.tiny_job import job, write_corpus
from tests.house.sources import ROOT

LONG = 1_000_000
SCRIPT = ("bash", str(ROOT / "examples/launch/torchrun.sh"), "--nproc", "2", "--python", sys.executable)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *PRETRAIN)
# a person's own script, that goes on after training
WRAPPED = ("bash", "-c", '"$@"; echo "ended with $?" >&2; exit 3', "bash", sys.executable, *PRETRAIN)


def survivors(mark: str) -> list[str]:
    """Commands of running processes with the mark in their environment (Linux); those that ended do not count."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "code"), [(SCRIPT, 75), (TORCHRUN, 1), (WRAPPED, 3)], ids=["script", "torchrun", "wrapped"]
)
def test_ctrl_c_leaves_a_checkpoint_and_no_process(command: Sequence[str], code: int, tmp_path: Path) -> None:
    config = job(
        write_corpus(tmp_path / "tokens"),
        training={"train_iters": LONG},
        data={"num_workers": 2},
        checkpoint={"save": str(tmp_path / "saved"), "load": "latest"},
        logging={"log_dir": str(tmp_path / "log")},
    )
    mark = f"mark-{uuid.uuid4()}"
    process = subprocess.Popen(
        [*command, "--config", str(write_recipe(tmp_path, config))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: len(steps_in(tmp_path / "log")) >= 2, process, 300)
    assert survivors(mark)
    os.killpg(process.pid, signal.SIGINT)
    out, said = process.communicate(timeout=300)
    assert whole_checkpoint(tmp_path / "saved").step == steps_in(tmp_path / "log")[-1], said
    assert "stopped by a signal" in out, out
    # what was told to end may take a moment to
    deadline = time.monotonic() + 30
    while survivors(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert survivors(mark) == []
    # bash goes on where the program took the signal and ended by itself
    assert process.returncode == code and ("ended with 75" in said) == (command is WRAPPED), said
