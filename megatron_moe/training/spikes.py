"""Steps whose loss or gradient norm leaps far above those of the last steps.

Both figures are the same on all ranks, and so is every decision; nothing is exchanged.  [after OLMo's skipped steps]
A step that is skipped stays out of the window, so that a spike does not make the next one look normal.
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

from megatron_moe.config.errors import SpikeError

# a series that hardly moves has no spread to measure by: a millionth of its mean counts as one sigma
LEAST_SPREAD = 1e-6


class Figure:
    """One figure of the last steps. The first half of the window only fills."""

    def __init__(self, length: int) -> None:
        self._values: deque[float] = deque(maxlen=length)

    def sigmas(self, value: float) -> float:
        """How many standard deviations of the window the value lies above its mean; 0 while there are too few."""
        count = len(self._values)
        length = self._values.maxlen or 0
        if count < max(2, length // 2):
            return 0.0
        mean = math.fsum(self._values) / count
        variance = math.fsum((known - mean) ** 2 for known in self._values) / (count - 1)
        return (value - mean) / max(math.sqrt(variance), LEAST_SPREAD * abs(mean), 1e-300)

    def add(self, value: float) -> None:
        self._values.append(value)

    def state_dict(self) -> list[float]:
        """Oldest first; written to JSON and read again, the same numbers."""
        return list(self._values)

    def load_state_dict(self, values: Iterable[float]) -> None:
        self._values.clear()
        self._values.extend(values)


class SpikeWatch:
    """Loss and gradient norm of the last `length` steps; sigma None: watches nothing."""

    def __init__(self, sigma: float | None, length: int) -> None:
        self.sigma = sigma
        self.figures = {"loss": Figure(length), "gradient norm": Figure(length)}

    def judge(self, loss: float, grad_norm: float) -> None:
        """Raises SpikeError, on all ranks alike, for a step that must not be learnt from; remembers all others."""
        if self.sigma is None:
            return
        now = {"loss": loss, "gradient norm": grad_norm}
        far = {name: figure.sigmas(now[name]) for name, figure in self.figures.items()}
        high = [f"{name} {now[name]:.6g} is {far[name]:.1f} sigma" for name in far if far[name] > self.sigma]
        if high:
            raise SpikeError(
                f"the {' and the '.join(high)} above the mean of the last steps, more than --spike-sigma {self.sigma}"
            )
        for name, figure in self.figures.items():
            if math.isfinite(now[name]):
                figure.add(now[name])

    def state_dict(self) -> dict[str, list[float]]:
        return {name: figure.state_dict() for name, figure in self.figures.items()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Of a checkpoint without them, the windows begin anew."""
        for name, figure in self.figures.items():
            figure.load_state_dict(values.get(name, ()))
