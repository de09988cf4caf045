"""Being asked to stop: a signal, or a file that appears, ends the run after this step, with a checkpoint.

A second signal ends it now.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from megatron_moe.config.training import TrainingConfig
from megatron_moe.parallel.state import Axis

# SLURM and Kubernetes send the first, `scancel --signal` the second, a person at a terminal the third
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# what the ranks agree on: the largest of their numbers
NOTHING, A_SIGNAL, THE_FILE = 0.0, 1.0, 2.0
ECHO_SECONDS = 2.0  # SLURM signals every process and torchrun passes it on: the same request arrives twice


class StopSignals:
    """Watches for stop signals while the `with` block runs, in the main thread; and for a file, on the first rank."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, kill_switch: Path | None = None) -> None:
        """clock: seconds.  kill_switch: stop when this file exists."""
        self._clock = clock
        self._kill_switch = kill_switch
        self._asked_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self.reason: str | None = None  # who asked, once the ranks agreed to stop

    @classmethod
    def of(cls, config: TrainingConfig) -> "StopSignals":
        """What a run is told to watch for."""
        switch = config.kill_switch_file
        return cls(kill_switch=Path(switch) if switch else None)

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
        # other ranks may not see the file, or not yet
        switched = axis.is_first and self._kill_switch is not None and os.path.lexists(self._kill_switch)
        mine = THE_FILE if switched else A_SIGNAL if self._asked_at is not None else NOTHING
        asked = float(axis.comm.all_reduce_(torch.tensor([mine], device=device), "max").item())
        if asked != NOTHING:
            self.reason = f"the file {self._kill_switch}" if asked == THE_FILE else "a signal"
        return self.stopped

    @property
    def stopped(self) -> bool:
        """Whether the ranks agreed to stop."""
        return self.reason is not None
