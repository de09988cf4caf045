"""Being asked to stop: the first signal ends the run after this step, with a checkpoint; a second one ends it now."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch

from megatron_moe.parallel.state import Axis

# SLURM and Kubernetes send the first, `scancel --signal` the second, a person at a terminal the third
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 2.0  # SLURM signals every process and torchrun passes it on: the same request arrives twice


class StopSignals:
    """Watches for stop signals while the `with` block runs, in the main thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self._clock = clock
        self._asked_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self.stopped = False  # True once the ranks agreed to stop

    def __enter__(self) -> "StopSignals":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: somebody's handler in C, which Python cannot put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at >= ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            os._exit(128 + number)  # process 1 of a container survives its own signals

    def agreed(self, axis: Axis, device: torch.device) -> bool:
        """True on all ranks if any of them was asked to stop. Collective: one number."""
        asked = torch.tensor([float(self._asked_at is not None)], device=device)
        self.stopped = bool(axis.comm.all_reduce_(asked, "max").item())
        return self.stopped
