"""Starts a training job with torchrun, follows its progress, and can interrupt it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RECIPE = Path(__file__).with_name("recipe.toml")


@dataclass(frozen=True)
class Job:
    """One torchrun job of the tour."""

    name: str
    num_ranks: int
    layout: Sequence[str]  # flags
    flags: Sequence[str]
    folder: Path

    def command(self) -> list[str]:
        launcher = [sys.executable, "-m", "megatron_moe.launch", "--nproc-per-node", str(self.num_ranks)]
        module = ["-m", "megatron_moe.pretrain", "--config", str(RECIPE)]
        return [*launcher, *module, *self.layout, *self.flags]


def records(folder: Path) -> list[dict[str, float]]:
    """The training lines of metrics.jsonl so far; a line that is being written is left out."""
    path = folder / "log" / "metrics.jsonl"
    if not path.exists():
        return []
    complete = path.read_text().rpartition("\n")[0]
    found = [json.loads(line) for line in complete.splitlines()]
    return [record for record in found if "loss" in record]


def run_job(job: Job, total_steps: int, interrupt_at: int | None = None) -> int:
    """Run to the end, or send SIGTERM once `interrupt_at` steps are done; returns the job's exit code."""
    log = job.folder / f"{job.name}.log"
    before = len(records(job.folder))
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps  loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with log.open("w") as output, Progress(*columns, transient=True) as progress:
        bar = progress.add_task(job.name, total=total_steps, loss="-")
        process = subprocess.Popen(job.command(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        interrupted = False
        while process.poll() is None:
            time.sleep(0.1)
            found = records(job.folder)
            if len(found) > before:
                step = int(found[-1]["step"])
                progress.update(bar, completed=step, loss=f"{found[-1]['loss']:.3f}")
                if interrupt_at is not None and step >= interrupt_at and not interrupted:
                    process.send_signal(signal.SIGTERM)
                    interrupted = True
    return process.returncode


def expect(code: int, wanted: int, job: Job) -> None:
    """Raises RuntimeError with the end of the job's log when it ended otherwise than wanted."""
    if code != wanted:
        log = job.folder / f"{job.name}.log"
        tail = "\n".join(log.read_text().splitlines()[-25:])
        raise RuntimeError(f"{job.name} ended with exit code {code}, expected {wanted}; the end of {log}:\n{tail}")
