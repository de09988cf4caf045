"""A cluster of one node and its queue, enough of SLURM to run a batch script over and over: srun, scontrol, sbatch."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# starts the ranks, each in a group and with a place of its own, and hands signals on to all of its group; ends those
# that are left --wait seconds after the first has ended; ends with the largest exit code
SRUN = """#!{python} -ISE
import os, signal, subprocess, sys, time
signals = (signal.SIGTERM, signal.SIGUSR1)
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
command, wait = sys.argv[1:], 1e9
while command[0].startswith("--"):
    flag, _, value = command.pop(0).partition("=")
    wait = float(value) if flag == "--wait" else wait
ranks = []
for rank in map(str, range(int(os.environ["SLURM_NTASKS"]))):
    place = dict(SLURM_STEP_ID="0", SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURMD_NODENAME="localhost")
    own = lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    ranks.append(subprocess.Popen(command, env=os.environ | place, start_new_session=True, preexec_fn=own))
def pass_on(number, frame):
    for rank in ranks:
        if rank.returncode is None:
            os.killpg(rank.pid, number)
for number in signals:
    signal.signal(number, pass_on)
step = os.path.join(os.environ["QUEUE"], "step")
with open(step + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename(step + ".new", step)
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
until = None
while any(rank.poll() is None for rank in ranks):
    if until is None and any(rank.returncode is not None for rank in ranks):
        until = time.monotonic() + wait
    if until is not None and time.monotonic() > until:
        pass_on(signal.SIGKILL, None)
    time.sleep(0.01)
os.remove(step)
sys.exit(max(rank.returncode if rank.returncode >= 0 else 128 - rank.returncode for rank in ranks))
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") echo 127.0.0.1 ;;
requeue*) touch "$QUEUE/requeue" && kill -TERM $PPID ;;
*) exit 1 ;;
esac
"""


@dataclass
class Start:
    """One time that the job got its nodes."""

    process: "subprocess.Popen[bytes]"
    queue: Path

    @property
    def step(self) -> int | None:
        """The process of srun, once it has started the ranks and until it ends."""
        try:
            return int((self.queue / "step").read_text())
        except FileNotFoundError:
            return None

    def time_is_nearly_up(self) -> None:
        """--signal=B:USR1: to the batch script alone."""
        self.process.send_signal(signal.SIGUSR1)

    def preempt(self) -> None:
        """SIGTERM to all of the job's processes."""
        step = self.step
        if step is not None:
            os.kill(step, signal.SIGTERM)
        self.process.send_signal(signal.SIGTERM)


@dataclass
class Queue:
    """Runs one job until it does not come back."""

    folder: Path
    ranks: int
    environment: dict[str, str] = field(init=False)
    codes: list[int] = field(default_factory=list)  # of the batch script, for each start

    def __post_init__(self) -> None:
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (self.folder / name).write_text(text.replace("{python}", sys.executable))
            (self.folder / name).chmod(0o755)
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": str(self.ranks)}
        own = {"SLURM_SUBMIT_DIR": str(self.folder), "QUEUE": str(self.folder)}
        self.environment = plain | job | own | {"PATH": f"{self.folder}:{os.environ['PATH']}"}

    def submit(self, script: Path, *arguments: str, disturb: Callable[[Start], bool]) -> None:
        """Runs the script until it ends without coming back.

        disturb: called at each start, may signal it; True if SLURM preempted it, which then requeues it.
        """
        again = True
        with (self.folder / "job.log").open("ab") as log:  # --open-mode=append
            while again:
                (self.folder / "requeue").unlink(missing_ok=True)
                count = {"SLURM_RESTART_COUNT": str(len(self.codes))} if self.codes else {}
                process = subprocess.Popen(
                    ["bash", str(script), *arguments], env=self.environment | count, stdout=log, stderr=log
                )
                preempted = disturb(Start(process, self.folder))
                self.codes.append(process.wait(timeout=100))
                again = preempted or (self.folder / "requeue").exists()
