"""Work in a child that is killed: after a while, or before the n-th thing that it does to a disk."""

import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# what Python tells of before it changes a folder; writes and syncs are met by kills at random times
CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate"}
LIMIT_S = 120.0
DONE, KILLED, FAILED = "done", "killed", "failed"


def in_child(
    work: Callable[[], Any], *, after_s: float | None = None, at_change: int | None = None, under: Path, log: Path
) -> str:
    """Fork, work() and be killed; returns whether it was done first. A child that fails tells why in `log`.

    after_s: seconds from the fork to the kill.  at_change: kill before so many changes (from 0) in the folder `under`.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; the child uses none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(_work(work, at_change, under, log))
    if after_s is not None:
        time.sleep(after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = _reap(child)
    if os.WIFSIGNALED(status):
        return KILLED
    return DONE if os.waitstatus_to_exitcode(status) == 0 else FAILED


def _reap(child: int) -> int:
    """The child's status; one that hangs is an error, not a wait without end."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"process {child} hung for {LIMIT_S:.0f} s")


def _work(work: Callable[[], Any], at_change: int | None, under: Path, log: Path) -> int:
    told = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(told, 1)
    os.dup2(told, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    left = [at_change]
    here = str(under)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and left[0] is not None and _changes(event, arguments, here):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(watch)
    try:
        found = work()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return found if isinstance(found, int) else 0


def _changes(event: str, arguments: tuple[Any, ...], here: str) -> bool:
    if not str(arguments[0]).startswith(here) and not str(arguments[-1]).startswith(here):
        return False
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    return event != "open" or bool(int(arguments[2] or 0) & writes)
