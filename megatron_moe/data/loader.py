"""Hands out the batches of one step after another, reading ahead in threads if asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from megatron_moe.config.errors import ConfigError
from megatron_moe.data.batch import Batch
from megatron_moe.data.sampler import Sampler


class BatchSource(Protocol):
    """What a loader reads from."""

    def get(self, indices: Sequence[int]) -> Batch:
        """The samples with these numbers of the run, in this order."""
        ...


class Loader:
    """An endless iterator over steps; each is this rank's list of microbatches.

    `num_workers` threads prepare the next steps; the order does not depend on them. The state counts what was handed
    out, not what was read ahead. Close it, or use it in a `with` block, to end the threads.
    """

    def __init__(
        self, dataset: BatchSource, sampler: Sampler, *, device: torch.device | str = "cpu", num_workers: int = 0
    ) -> None:
        self.dataset, self.sampler, self.device = dataset, sampler, torch.device(device)
        self._num_workers = num_workers
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="loader") if num_workers else None
        self._ahead: deque[Future[list[Batch]]] = deque()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        batches = self._next_from_threads() if self._executor else self._read(self.sampler.consumed)
        self.sampler.advance()
        return [batch.to(self.device) for batch in batches]

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, int]:
        """All that a resumed run needs to go on with the next sample."""
        return {"consumed_samples": self.sampler.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on after `consumed_samples`; what was read ahead is dropped."""
        consumed = state["consumed_samples"]
        if consumed < 0:
            raise ConfigError(f"consumed_samples cannot be {consumed}; the count starts at 0.")
        self._drop_ahead()
        self.sampler.consumed = self.sampler.past(consumed)

    def close(self) -> None:
        """Ends the threads."""
        self._drop_ahead()
        if self._executor:
            self._executor.shutdown()

    def _next_from_threads(self) -> list[Batch]:
        assert self._executor is not None
        while len(self._ahead) <= self._num_workers:
            consumed = self.sampler.consumed
            for _ in self._ahead:
                consumed = self.sampler.after(consumed)
            self._ahead.append(self._executor.submit(self._read, consumed))
        try:
            return self._ahead.popleft().result()
        except BaseException:
            # the failed step stays the next one
            self._drop_ahead()
            raise

    def _read(self, consumed: int) -> list[Batch]:
        batches = [self.dataset.get(samples) for samples in self.sampler.microbatches(consumed)]
        return [batch.pin_memory() for batch in batches] if self.device.type == "cuda" else batches

    def _drop_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
