"""Processes that apply one function to a stream of items, with the results in order and memory bounded."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from megatron_moe.config.errors import MegatronMoEError

Item = TypeVar("Item")
Result = TypeVar("Result")
# items on the way to or from each worker
IN_FLIGHT = 2


class Workers(Generic[Item, Result]):
    """`count` processes; each calls `make` once for the function that it applies. One worker means this process.

    make: a picklable callable without arguments. Used in a `with` block, at whose end the processes are gone.
    """

    def __init__(self, make: Callable[[], Callable[[Item], Result]], count: int) -> None:
        self._make, self._count = make, count
        self._processes: list[Any] = []
        self._pipes: list[Connection[Any, Any]] = []

    def __enter__(self) -> Workers[Item, Result]:
        # spawned, not forked: this process may have threads
        context = multiprocessing.get_context("spawn")
        for number in range(self._count if self._count > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(self._make, theirs), name=f"worker-{number}", daemon=True)
            process.start()
            # so that the end of the process ends the pipe
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if error is not None:
                process.terminate()
            process.join()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """The result for each item, in order; MegatronMoEError if a worker dies."""
        if not self._pipes:
            function = self._make()
            yield from (function(item) for item in items)
            return
        sent = received = 0
        for item in items:
            if sent - received == IN_FLIGHT * self._count:
                yield self._receive(received % self._count)
                received += 1
            self._send(sent % self._count, item)
            sent += 1
        while received < sent:
            yield self._receive(received % self._count)
            received += 1

    def _send(self, number: int, item: Item) -> None:
        try:
            self._pipes[number].send(item)
        except OSError:
            raise self._death(number) from None

    def _receive(self, number: int) -> Result:
        try:
            result: Result = self._pipes[number].recv()
        except (EOFError, OSError):
            raise self._death(number) from None
        return result

    def _death(self, number: int) -> MegatronMoEError:
        process = self._processes[number]
        process.join(timeout=10)
        return MegatronMoEError(
            f"worker process {number} ended with exit code {process.exitcode}; -9 usually means that memory ran out: "
            "take fewer --workers. Nothing was written."
        )


def _work(make: Callable[[], Callable[[Any], Any]], pipe: Connection[Any, Any]) -> None:
    # Ctrl-C reaches the whole group: the main process alone decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function = make()
    waiting: queue.SimpleQueue[tuple[Any] | None] = queue.SimpleQueue()
    # always reading, so that two full pipes cannot wait for each other
    threading.Thread(target=_listen, args=(pipe, waiting), daemon=True).start()
    while entry := waiting.get():
        try:
            pipe.send(function(entry[0]))
        except OSError:
            return


def _listen(pipe: Connection[Any, Any], waiting: queue.SimpleQueue[tuple[Any] | None]) -> None:
    try:
        while True:
            waiting.put((pipe.recv(),))
    except (EOFError, OSError):
        waiting.put(None)
