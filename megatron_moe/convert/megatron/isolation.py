"""What a process that opens pickles gives up beforehand: network, endless memory, other programs, writing elsewhere.

It is a second fence behind the loaders, which refuse every name that they do not know. What the kernel holds: limits of
memory, CPU time and file size, no new privileges, and, where the machine permits it, a network namespace without any
interface. The audit hook is no such boundary: it stops Python code that would connect, start a program, or write
elsewhere, but not machine code that a flaw of the interpreter or of torch lets in. Files that the user can read stay
readable. For checkpoints of strangers, run the conversion in a container or a virtual machine.

This file imports the standard library only, and is used before threads exist, for a new namespace asks for that.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
PR_SET_NO_NEW_PRIVS = 38

DENIED_PREFIXES = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "pty.",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "os.fork",
)
DENIED = frozenset(
    {
        "os.system",
        "os.startfile",
        "os.kill",
        "os.killpg",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.truncate",
        "os.chmod",
        "os.chown",
        "os.link",
        "os.symlink",
        "os.putenv",
        "os.setxattr",
        "os.removexattr",
        "shutil.rmtree",
        "shutil.move",
        "shutil.copyfile",
        "signal.pthread_kill",
        # only loaders that choose their own names get past it
        "pickle.find_class",
        "sys.addaudithook",
        "sys.settrace",
        "sys.setprofile",
        "code.__new__",
    }
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forbidden(Exception):
    """Something that opening a checkpoint has no need of."""


def leave_network() -> str:
    """Enter a network namespace without interfaces; returns in words what came of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for flags in (CLONE_NEWNET, CLONE_NEWNET | CLONE_NEWUSER):
        if libc.unshare(flags) == 0:
            return "a network namespace without interfaces"
    return f"an audit hook only (no new network namespace: {os.strerror(ctypes.get_errno())})"


def limit_resources(*, memory: int, file_bytes: int, cpu_seconds: int) -> None:
    """memory: bytes of address space beyond what is in use now.   file_bytes: size of one written file."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * os.sysconf("SC_PAGE_SIZE")
    for kind, limit in (
        (resource.RLIMIT_AS, now + memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lowest, lowest))


def refuse_side_effects(writable: Path) -> None:
    """From here on, Python code of this process that connects, starts a program or writes outside `writable` fails."""
    sys.addaudithook(audit_hook(writable))


def audit_hook(writable: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """The hook; raises Forbidden."""
    inside = f"{os.path.realpath(writable)}/"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in DENIED or event.startswith(DENIED_PREFIXES):
            raise Forbidden(f"{event} {arguments[:2]!r} while a pickle is opened")
        if event == "open" and _opens_for_writing(arguments) and not _is_inside(arguments[0], inside):
            raise Forbidden(f"writing {arguments[0]!r} while a pickle is opened")
        if event == "os.mkdir" and not _is_inside(arguments[0], inside):
            raise Forbidden(f"making {arguments[0]!r} while a pickle is opened")

    return hook


def _opens_for_writing(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & WRITES)


def _is_inside(path: Any, inside: str) -> bool:
    if isinstance(path, int):  # an open file; it was looked at when it was opened
        return True
    return os.path.realpath(os.fsdecode(path)).startswith(inside)
