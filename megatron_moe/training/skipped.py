"""Steps that updated nothing, and ways back to an older checkpoint: up to a limit, remembered with their samples."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from megatron_moe.config.errors import NonFiniteError, SpikeError
from megatron_moe.config.training import TrainingConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkippedStep:
    """Samples first..last of the run were read and not learnt from, or no more are. step: counted from 1."""

    step: int
    first_sample: int
    last_sample: int
    reason: str  # "not finite" or "spike"
    back_to: int | None = None  # finished steps of the checkpoint that the run went back to; None: it went on


class Skipped:
    """All skipped steps of a run, the same on every rank; the limit is on those in a row."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self.in_a_row = 0
        self.steps: list[SkippedStep] = []

    def skip(self, error: NonFiniteError | SpikeError, step: int, samples: range) -> None:
        """Pass over a step that made no update, or raise its error: when it may not be skipped, or too many were."""
        of_numbers = isinstance(error, NonFiniteError)
        if of_numbers and self._config.nonfinite_action == "stop":
            raise error
        limit = self._config.max_skipped_steps
        if self.in_a_row >= limit:
            raise type(error)(
                f"{error}\nThe {limit} steps before step {step} were skipped already, as many in a row as "
                f"--max-skipped-steps allows. Look at their samples, lower --lr, or go back to an older checkpoint."
            ) from error
        self.in_a_row += 1
        self.steps.append(SkippedStep(step, samples[0], samples[-1], "not finite" if of_numbers else "spike"))
        said = "step %d skipped (%d of at most %d in a row), samples %d to %d are not learnt from: %s"
        logger.warning(said, step, self.in_a_row, limit, samples[0], samples[-1], error)

    def go_back(self, error: SpikeError, step: int, samples: range, back_to: int) -> None:
        """The run went back from this step, and leaves out these samples; raises its error if that was too often."""
        limit = self._config.max_skipped_steps
        if sum(known.back_to == back_to for known in self.steps) >= limit:
            raise SpikeError(
                f"{error}\nStep {step} is a spike, and the run went back to step {back_to} {limit} times already, as "
                f"often as --max-skipped-steps allows. Look at the samples, lower --lr, or go back further by hand."
            ) from error
        self.in_a_row = 0
        self.steps.append(SkippedStep(step, samples[0], samples[-1], "spike", back_to))
        said = "step %d: %s. Back to step %d, and on without some samples; by hand: --ckpt-step %d --skip-samples %d-%d"
        logger.warning(said, step, error, back_to, back_to, samples[0], samples[-1])

    def made(self) -> None:
        """A step was learnt from."""
        self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "steps": [asdict(step) for step in self.steps]}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Of a checkpoint that knows of none: there were none."""
        self.in_a_row = int(values.get("in_a_row", 0))
        self.steps = [SkippedStep(**step) for step in values.get("steps", ())]
