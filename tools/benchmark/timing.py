"""Times peers against each other, interleaved, on CUDA (events) or on the CPU (process time, one thread)."""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

Variant = Callable[[int], object]  # takes the number of the round, by which it chooses among its input sets

FLUSH_BYTES = 1 << 28  # several times the L2 of any card in use
SLOW = 5.0  # times the median variant: its every round would cost the others many of theirs


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    lowest: float
    highest: float
    iterations: int
    method: str


class Clock(ABC):
    """How long a call keeps the device busy."""

    method: str

    @abstractmethod
    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call, its result thrown away."""


class CpuClock(Clock):
    """CPU time of this process: what other processes on the machine do counts for little."""

    method = "median of process_time, one thread, peers interleaved, inputs rotated"

    def time(self, call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start


class CudaClock(Clock):
    """Device time between two events, after the L2 was overwritten."""

    method = "median of CUDA events, L2 flushed, peers interleaved, inputs rotated"

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def time(self, call: Callable[[], object]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # also gives the host a lead, so that the first launch is not counted
        self._flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock of a device; on the CPU it also limits torch to one thread."""
    if device.type == "cuda":
        return CudaClock()
    torch.set_num_threads(1)
    return CpuClock()


def measure(
    variants: Mapping[str, Variant], clock: Clock, *, seconds: float, least: int = 3, most: int = 50
) -> dict[str, Timing]:
    """Times each variant once a round, in an order that turns by one each round.

    seconds: about how long all rounds together may take; at least `least` and at most `most` of them run, after two
    that do not count.  A variant much slower than the others (SLOW) leaves after the first `least` rounds.
    """

    def once(name: str, turn: int) -> float:
        return clock.time(lambda: variants[name](turn))

    warm = [{name: once(name, turn) for name in variants} for turn in range(2)][-1]
    limit = SLOW * statistics.median(warm.values())
    lasting = sum(taken for taken in warm.values() if taken <= limit)
    slow = least * (sum(warm.values()) - lasting)
    rounds = max(least, min(most, int((seconds - slow) / max(lasting, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        names = [name for name in variants if turn < least or warm[name] <= limit]
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(once(name, turn))
    return {
        name: Timing(statistics.median(times), min(times), max(times), len(times), clock.method)
        for name, times in found.items()
    }


def saved_bytes(call: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, weights left out."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(kept.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """High-water mark of device memory during a call, above what was there before; None on the CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def top_operations(call: Callable[[], object], device: torch.device, count: int = 12) -> list[tuple[str, float, int]]:
    """(name, share of the time, calls) of the costliest operations or kernels of one call."""
    call()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = profiler.key_averages()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = [(event.key, float(getattr(event, own)), event.count) for event in events]
    if device.type == "cuda":
        # kernels only: an operator's own device time is that of the kernels it launched, counted a second time
        kernels = {event.key for event in events if str(event.device_type).endswith("CUDA")}
        times = [entry for entry in times if entry[0] in kernels]
    total = sum(seconds for _, seconds, _ in times) or 1.0
    ordered = sorted(times, key=lambda entry: -entry[1])[:count]
    return [(name, seconds / total, calls) for name, seconds, calls in ordered]
