"""A process that has imported all of the program, and forks a rank for each command line that a stand-in sends it.

The stand-in (CLIENT) takes the place of the interpreter in a launch script: it hands over its arguments, environment,
folder and output, passes signals on to the rank, and ends with the rank's exit code. It notes the rank's process in
the folder $QUEUE.
"""

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from megatron_moe.pretrain import main

# python -m megatron_moe.pretrain ARGUMENTS, of which nothing is imported but sockets
CLIENT = """#!{python} -ISE
import signal
signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
told = json.dumps([sys.argv[3:], dict(os.environ), os.getcwd()]).encode()
fds = array.array("i", [1, 2])
server.sendmsg([len(told).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
server.sendall(told)
answers = server.makefile()
rank = int(answers.readline())
with open(os.path.join(os.environ["QUEUE"], "rank" + os.environ["SLURM_PROCID"]), "w") as file:
    file.write(str(rank))
for number in signals:
    signal.signal(number, lambda number, frame: os.kill(rank, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
code = int(answers.readline())
sys.exit(code if code >= 0 else 128 - code)
"""


@contextmanager
def warm_ranks(folder: Path) -> Iterator[Path]:
    """The path of the stand-in; at the end the server and all its ranks are gone."""
    path, client = folder / "warm.sock", folder / "warm_python"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    client.write_text(CLIENT.format(python=sys.executable, path=str(path)))
    client.chmod(0o755)
    tests = os.getpid()
    server = os.fork()
    if not server:
        os.setsid()
        _serve(listener, tests)
    listener.close()
    try:
        yield client
    finally:
        os.killpg(server, signal.SIGKILL)
        os.waitpid(server, 0)


def _serve(listener: socket.socket, tests: int) -> None:
    """One process for each connection; ends with the tests' process, however that ends."""
    # nobody waits for those processes
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener.settimeout(1.0)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if os.getppid() != tests:
                os.killpg(0, signal.SIGKILL)
            continue
        connection.setblocking(True)
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(connection)
        connection.close()


def _watch(connection: socket.socket) -> None:
    """Forks the rank, and tells its process id and then its exit code."""
    size, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(2 * 4))
    data = b""
    while len(data) < int.from_bytes(size, "big"):
        data += connection.recv(1 << 16)
    outputs = [int.from_bytes(ancillary[0][2][at : at + 4], sys.byteorder) for at in (0, 4)]
    rank = os.fork()
    if not rank:
        connection.close()
        _run(json.loads(data), outputs)
    connection.sendall(f"{rank}\n".encode())
    found = status = 0
    while not found:
        found, status = os.waitpid(rank, os.WNOHANG)
        if not found and select.select([connection], [], [], 0.02)[0]:
            os.kill(rank, signal.SIGKILL)  # the stand-in is gone
    with suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _run(told: list[object], outputs: list[int]) -> None:
    """As a fresh interpreter would: main, with nothing of the tests around it."""
    arguments, environment, folder = told
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for theirs, own in zip(outputs, (1, 2), strict=True):
        os.dup2(theirs, own)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)  # type: ignore[call-overload]
    os.chdir(folder)  # type: ignore[arg-type]
    torch.set_num_threads(1)
    code = 1
    try:
        code = main(arguments)  # type: ignore[arg-type]
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # interpreter shutdown of a fork is slow
        os._exit(code)
