"""examples/launch/torchrun.sh: what it starts, and that signals and exit codes pass through what it starts."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_moe.launch import verdict
from tests.house.sources import ROOT

SCRIPT = ROOT / "examples/launch/torchrun.sh"

# ranks that need no torch: they save on SIGTERM as the trainer does, or fail, or finish
RANK = """
import os, pathlib, signal, sys, time
rank, mode, folder = int(os.environ["RANK"]), sys.argv[1], pathlib.Path(sys.argv[2])
def save(number, frame):
    time.sleep(0.2 * rank)
    (folder / f"saved{rank}").touch()
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
(folder / f"start{os.environ['TORCHELASTIC_RESTART_COUNT']} of {rank}").touch()
(folder / f"started{rank}").touch()
if mode == "fail" and rank == 1:
    sys.exit(16)
if mode == "finish":
    sys.exit(0)
time.sleep(60)
"""


def dry_run(*arguments: str) -> list[str]:
    command = ["bash", str(SCRIPT), "--dry-run", "--python", sys.executable, *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return shlex.split(answer.stdout)


def launch(folder: Path, mode: str, *options: str) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    # the command of the dry run, on two ranks of another program
    *command, _, _ = dry_run("--nproc", "2")
    command += options
    command += [str(folder / "rank.py"), mode, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(folder: Path, names: set[str], process: subprocess.Popen[str]) -> None:
    while not names <= {path.name for path in folder.iterdir()}:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)  # the test's own time limit ends this


def test_dry_run_prints_the_exact_command() -> None:
    words = dry_run("--nproc", "3", "--config", "recipe.toml")
    assert words[:3] == [sys.executable, "-m", "megatron_moe.launch"]
    assert words[-6:] == ["--nproc-per-node", "3", "-m", "megatron_moe.pretrain", "--config", "recipe.toml"]


def test_arguments_pass_through_unharmed(tmp_path: Path) -> None:
    odd = ["--save", "a b", "$(touch made)", "; touch made", "--nproc", "*", ""]
    assert dry_run("--nproc", "1", "--", *odd)[-len(odd) :] == odd
    assert not (Path.cwd() / "made").exists()


def test_without_a_number_there_is_one_process_for_each_gpu(tmp_path: Path) -> None:
    for gpus, expected in (("0", "1"), ("4", "4")):
        fake = tmp_path / f"python{gpus}"
        # answers the script's question as a torch that sees so many GPUs would
        fake.write_text(f'#!/bin/sh\nexport PYTHONPATH={tmp_path}/torch{gpus}\nexec {sys.executable} "$@"\n')
        fake.chmod(0o755)
        (tmp_path / f"torch{gpus}").mkdir()
        (tmp_path / f"torch{gpus}" / "torch.py").write_text(f"class cuda:\n    device_count = lambda: {gpus}\n")
        command = ["bash", str(SCRIPT), "--dry-run", "--python", str(fake)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"--nproc-per-node {expected} " in answer.stdout


@pytest.mark.parametrize("nproc", ["0", "two", "-1", "1;ls"])
def test_a_wrong_number_of_processes_is_refused(nproc: str) -> None:
    command = ["bash", str(SCRIPT), "--dry-run", "--nproc", nproc]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "--nproc" in answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "restarts"), [(signal.SIGTERM, "3"), (signal.SIGUSR1, "0")])
def test_a_signal_reaches_every_rank_and_their_75_comes_back(
    tmp_path: Path, number: signal.Signals, restarts: str
) -> None:
    process = launch(tmp_path, "sleep", "--max-restarts", restarts)
    wait_for(tmp_path, {"started0", "started1"}, process)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    # what was asked to stop is not started again
    assert sorted(path.name for path in tmp_path.glob("start? of ?")) == ["start0 of 0", "start0 of 1"]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "code"), [("fail", 16), ("finish", 0)])
def test_the_exit_code_is_that_of_the_ranks(tmp_path: Path, mode: str, code: int) -> None:
    process = launch(tmp_path, mode)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([], 0),
        ([0, 0], 0),
        ([75, 75], 75),
        ([86, 65, 86], 65),  # a victim hides no cause
        ([86, -9], 86),
        ([-9, 86], 86),
        ([-9, 0], 137),
        ([2, 64], 2),
    ],
)
def test_one_code_speaks_for_all_ranks(codes: list[int], code: int) -> None:
    assert verdict(codes) == code
