"""Being asked to stop: the first signal ends the run after this step, with a checkpoint; a second one ends it now."""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch

from megatron_moe.parallel.state import Axis

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM and Kubernetes send the one, `scancel --signal` the other


class StopSignals:
    """Watches for stop signals while the `with` block runs, in the main thread."""

    def __init__(self) -> None:
        self._asked = False
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
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked = True

    def agreed(self, axis: Axis, device: torch.device) -> bool:
        """True on all ranks if any of them was asked to stop. Collective: one number."""
        asked = torch.tensor([float(self._asked)], device=device)
        self.stopped = bool(axis.comm.all_reduce_(asked, "max").item())
        return self.stopped
