"""Real processes of a job, and what they leave."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.load import CheckpointReader, find_checkpoint
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pretrain import main
from tests.house.sources import ROOT

PRETRAIN = ("-m", "megatron_moe.pretrain")
# a free port of its own for each job
LAUNCH = ("-m", "megatron_moe.launch", "--standalone", "--nproc-per-node", "2", *PRETRAIN)


def write_recipe(folder: Path, config: RunConfig) -> Path:
    """A file for --config."""
    path = folder / "job.json"
    path.write_text(config.to_json())
    return path


def start(*arguments: str, variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A Python process with these arguments, in the repository's root."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(*arguments: str) -> int:
    """The job in this process, on one rank; returns its exit code. Logging is as before afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        return main(arguments)
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the job does not get there"
        time.sleep(0.02)


def steps_in(log_dir: Path) -> list[int]:
    """The steps of metrics.jsonl, in its order; a line that is being written is left out."""
    path = log_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]
    return [int(line["step"]) for line in lines if "loss" in line]


def whole_checkpoint(root: Path) -> CheckpointReader:
    """The newest one, every byte compared with its hash."""
    return find_checkpoint(root, None, ParallelState.alone().world, strict=True, check="xxh3")


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash, every link with its target, every folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def problem(said: str) -> str:
    """The one paragraph that the job wrote to stderr; fails if there is more, less, or a traceback."""
    assert "Traceback" not in said and said.count("megatron_moe: ") == 1, said
    text = said.partition("megatron_moe: ")[2].strip()
    assert text and "\n\n" not in text, said
    return text
