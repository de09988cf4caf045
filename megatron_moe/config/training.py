"""How long to train, in which portions, and when to stop."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import REQUIRED, check_values, option


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, in which portions, and when to stop."""

    flag_prefix: ClassVar[str] = ""

    micro_batch_size: int = option(1, "samples in one forward pass of a data-parallel rank", at_least=1)
    global_batch_size: int = option(REQUIRED, "samples in one step, over all ranks", at_least=1)
    train_iters: int | None = option(None, "optimizer steps of the whole run", at_least=1)
    train_samples: int | None = option(
        None, "the same in samples, instead; a last incomplete global batch is left out", at_least=1
    )
    eval_interval: int | None = option(None, "evaluate every so many steps; none = never", at_least=1)
    eval_iters: int = option(10, "global batches in one evaluation", at_least=1)
    seed: int = option(1234, "seed of initial weights, data order and routing noise", at_least=0)
    exit_interval: int | None = option(
        None, "end the run, with a checkpoint and exit code 0, at a step divisible by this", at_least=1
    )
    exit_duration_in_mins: float | None = option(
        None, "end the run, with a checkpoint and exit code 0, after so many minutes", above=0
    )
    kill_switch_file: str | None = option(
        None, "end the run, with a checkpoint and exit code 75, after the step in which this file exists on rank 0"
    )
    check_for_nan_in_loss_and_grad: bool = option(True, "stop when a loss or gradient is NaN or infinite")
    nonfinite_action: str = option(
        "stop",
        "what follows a loss, gradient or optimizer state that is NaN or infinite, also when the step is played again; "
        "stop: exit code 16; skip: the step updates nothing, and its samples count as read",
        choices=("stop", "skip"),
    )
    spike_sigma: float | None = option(
        None,
        "skip a step whose loss or gradient norm lies more than so many standard deviations above the mean of the last "
        "steps; none = learn from every step",
        above=0,
    )
    spike_action: str = option(
        "skip",
        "what follows such a step; skip: it updates nothing, and its samples count as read; rewind: back to an older "
        "checkpoint in --save, and on from there behind the samples of the spike, without those read since; as skip "
        "while there is no checkpoint",
        choices=("skip", "rewind"),
    )
    spike_rewind_steps: int = option(
        100,
        "--spike-action rewind goes back to the newest checkpoint at least so many steps before the spike; to the "
        "oldest if there is none",
        at_least=1,
    )
    spike_window: int = option(128, "steps of which --spike-sigma knows mean and deviation", at_least=4)
    max_skipped_steps: int = option(
        5,
        "stop with exit code 16 rather than skip more steps in a row, or go back to one checkpoint more often",
        at_least=1,
    )
    skip_samples: tuple[str, ...] = option(
        (),
        "samples of the run that no step reads, FIRST-LAST each, whole global batches in ascending order: to go on "
        "from an older checkpoint without those of a spike",
    )
    check_replicas_interval: int | None = option(
        None,
        "every so many steps compare, by hashes, all weights, router states and optimizer states that several ranks "
        "must hold alike; on a difference stop with exit code 16; none = only what a checkpoint saves is compared",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_values(self)
        if (self.train_iters is None) == (self.train_samples is None):
            problem = "says how long to train" if self.train_iters is None else "may say how long to train, not both"
            raise ConfigError(f"one of --train-iters and --train-samples {problem}; give exactly one of them.")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"--global-batch-size {self.global_batch_size} is no multiple of "
                f"--micro-batch-size {self.micro_batch_size}; change one of them."
            )
        if self.num_steps < 1:
            raise ConfigError(
                f"--train-samples {self.train_samples} is less than one --global-batch-size "
                f"{self.global_batch_size}; train on at least one global batch."
            )
        _ = self.left_out

    @property
    def left_out(self) -> tuple[range, ...]:
        """Samples that no step reads, ascending."""
        found: list[range] = []
        for text in self.skip_samples:
            samples = _whole_batches(text, self.global_batch_size)
            if found and samples.start < found[-1].stop:
                given = " ".join(self.skip_samples)
                raise ConfigError(f"--skip-samples {given} must ascend without overlap; sort them.")
            found.append(samples)
        return tuple(found)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, whichever way it was given."""
        if self.train_iters is not None:
            return self.train_iters
        return (self.train_samples or 0) // self.global_batch_size


def _whole_batches(text: str, size: int) -> range:
    """Raises ConfigError for what is no FIRST-LAST or no whole global batches."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"--skip-samples {text} is no range; give FIRST-LAST, both whole numbers.")
    samples = range(int(first), int(last) + 1)
    if not samples or samples.start % size or samples.stop % size:
        raise ConfigError(
            f"--skip-samples {text} must hold whole global batches: with --global-batch-size {size}, FIRST and LAST + "
            f"1 are multiples of {size}, as the log writes the samples of a skipped step."
        )
    return samples
