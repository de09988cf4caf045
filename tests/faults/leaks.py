"""What must not stay behind when a job, or a part of it, was killed."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.launch import children

# other programs of this machine use shared memory too, for moments; what was left behind stays
GRACE_S = 5.0


@dataclass(frozen=True)
class Held:
    """What this process, and this machine for it, holds: compare before and after."""

    children: frozenset[int]
    handles: int
    ports: frozenset[str]
    shared_memory: frozenset[str]

    @classmethod
    def now(cls) -> "Held":
        return cls(
            frozenset(children(os.getpid())),
            len(os.listdir("/proc/self/fd")),
            frozenset(_ports()),
            segments(),
        )


def leaked(before: Held, *, slack: int = 0) -> list[str]:
    """What there is now and was not `before`. slack: further file handles that may be open."""
    after = Held.now()
    found = [f"child process {child}" for child in after.children - before.children]
    found += [f"listening on {port}" for port in after.ports - before.ports]
    stays, until = after.shared_memory - before.shared_memory, time.monotonic() + GRACE_S
    while stays and time.monotonic() < until:
        time.sleep(0.05)
        stays &= segments()
    found += [f"/dev/shm/{name}" for name in stays]
    more = after.handles - before.handles
    return found + ([f"{more} file handles"] if more > slack else [])


def segments() -> frozenset[str]:
    """Shared memory and semaphores, by name."""
    return frozenset(name for name in _listed("/dev/shm") if name.startswith(("torch_", "psm_", "sem.mp-")))


def _listed(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def _ports() -> list[str]:
    """Sockets that this process listens on. What a child listened on is gone with it."""
    ours = set()
    for handle in os.listdir("/proc/self/fd"):
        try:
            ours.add(os.readlink(f"/proc/self/fd/{handle}"))
        except FileNotFoundError:
            continue  # that of the listing itself
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if os.path.exists(table) else []:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in ours:
                listening.append(words[1])
    return listening


def left_by_saves(root: Path) -> list[str]:
    """Folders and links that a save or rotation that was cut short has left."""
    return sorted(name for name in os.listdir(root) if ".tmp" in name) if root.is_dir() else []
