"""What hostile code may try in a process that opens pickles."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

Payload = Callable[[Path, int, int], object]  # a folder, a port of this machine, the number of the parent process


def unpickle(folder: Path, _: int, __: int) -> object:
    return pickle.loads(b"cbuiltins\nopen\n(S'" + os.fsencode(folder / "sentinel") + b"'\nS'w'\ntR.")


PAYLOADS: dict[str, Payload] = {
    "writes a file": lambda folder, *_: (folder / "sentinel").write_text("x"),
    "writes by the kernel's call": lambda folder, *_: os.open(folder / "sentinel", os.O_CREAT | os.O_WRONLY),
    "appends to a file": lambda folder, *_: (folder / "precious").open("a"),
    "removes a file": lambda folder, *_: (folder / "precious").unlink(),
    "renames a file": lambda folder, *_: (folder / "precious").rename(folder / "gone"),
    "makes a folder": lambda folder, *_: (folder / "made").mkdir(),
    "links a file": lambda folder, *_: (folder / "link").symlink_to("precious"),
    "runs a program": lambda folder, *_: subprocess.run(["touch", str(folder / "sentinel")], check=True),
    "becomes a program": lambda *_: os.execv("/bin/true", ["true"]),
    "starts a program": lambda *_: os.posix_spawn("/bin/true", ["true"], {}),
    "forks": lambda *_: os.fork(),
    "connects": lambda _, port, __: socket.create_connection(("127.0.0.1", port), timeout=5),
    "asks for a name": lambda *_: socket.getaddrinfo("localhost", 80),
    "ends its parent": lambda _, __, parent: os.kill(parent, signal.SIGTERM),
    "calls machine code": lambda *_: ctypes.CDLL(None),
    "unpickles": unpickle,
    "takes endless memory": lambda *_: bytearray(1 << 34),
}
