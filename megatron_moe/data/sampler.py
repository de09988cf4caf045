"""Which samples each rank reads in each microbatch of each step; the whole state is one integer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe.config.errors import ConfigError


class Sampler:
    """Cuts the run's samples, in order, into steps and microbatches.

    A step takes the next `global_batch_size` samples, whatever the layout. Microbatch m of data-parallel rank r takes
    `micro_batch_size` consecutive samples from (m * dp_size + r) * micro_batch_size on, counted from the step's first.
    Samples in `left_out`, ascending ranges of whole steps, are no step's: the one before them is followed by the one
    behind them.
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed: int = 0,
        left_out: Sequence[range] = (),
    ) -> None:
        at_once = micro_batch_size * dp_size
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % at_once:
            raise ConfigError(
                f"--global-batch-size {global_batch_size} must be a multiple of --micro-batch-size {micro_batch_size} "
                f"x {dp_size} data-parallel ranks = {at_once}; change one of them."
            )
        if consumed < 0:
            raise ConfigError(f"consumed samples cannot be {consumed}; the count starts at 0.")
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._left_out = left_out
        self.consumed = self.past(consumed)

    def past(self, consumed: int) -> int:
        """Where a step begins after so many samples: behind those that are left out."""
        for samples in self._left_out:
            if consumed in samples:
                consumed = samples.stop
        return consumed

    def after(self, consumed: int) -> int:
        """Where the step begins that follows the one which begins after `consumed` samples."""
        return self.past(consumed + self.global_batch_size)

    @property
    def next_step(self) -> range:
        """Samples of the next step, over all ranks."""
        return range(self.consumed, self.consumed + self.global_batch_size)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one step on this rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def microbatches(self, consumed: int | None = None) -> list[range]:
        """This rank's samples in the step that starts after `consumed` samples (None: the next step)."""
        start = self.consumed if consumed is None else consumed
        first = [
            start + (number * self.dp_size + self.dp_rank) * self.micro_batch_size
            for number in range(self.num_microbatches)
        ]
        return [range(sample, sample + self.micro_batch_size) for sample in first]

    def advance(self) -> None:
        """One step has been taken."""
        self.consumed = self.after(self.consumed)
