"""What Linux tells of a process."""

import os
import signal
from pathlib import Path

STATES = {"T": "stopped by a signal (state T)", "t": "held by a debugger (state t)", "D": "in the kernel (state D)"}


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third, the state, on; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def state_of(pid: int) -> str:
    """One letter, such as R (running), S (asleep), T (stopped), Z (dead, its parent has not asked yet); "" = gone."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def how_it_ended(pid: int) -> str:
    """Of a process that has ended: "was killed by SIGKILL", as long as its parent has not asked for its status."""
    fields = _stat(pid)
    if not fields or fields[0] not in "ZX":
        return "died (how, is unknown: its parent has asked for its status already)"
    status = int(fields[-1])
    if os.WIFSIGNALED(status):
        return f"was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with exit code {os.waitstatus_to_exitcode(status)} and without a word"


def descendants(pid: int, but: int) -> list[int]:
    """Its children, their children and so on, without those of process `but`, and without that one."""
    found: list[int] = []
    for task in _tasks(pid):
        try:
            children = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue  # a thread that ended
        for child in children:
            if child != but:
                found += [child, *descendants(child, but)]
    return found


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []


def send_signal(pid: int, number: int) -> None:
    """To a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
