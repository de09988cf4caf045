"""What a person reads while a model trains: one line a step, in Megatron's words and order."""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.training.metrics import RoutingSummary

MEGATRON_NAMES = {"load_balance_loss": "load_balancing_loss"}


@dataclass(frozen=True)
class StepRecord:
    """The figures of one log line; every sink is fed from it."""

    step: int
    total_steps: int
    consumed_samples: int
    global_batch_size: int
    seconds: float  # for a step
    tokens: int  # in a step
    world_size: int
    flops: float  # of the whole step, model FLOPs
    peak_flops: float | None  # of one device
    loss: float  # nats per token
    aux_losses: dict[str, float]  # unweighted, summed over layers
    learning_rate: float
    grad_norm: float
    routing: RoutingSummary | None
    gpu: dict[str, float] | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def flops_per_device(self) -> float:
        """FLOP/s of one device."""
        return self.flops / self.seconds / self.world_size

    @property
    def mfu(self) -> float | None:
        return None if self.peak_flops is None else self.flops_per_device / self.peak_flops


def log_line(record: StepRecord) -> str:
    """The line of one step."""
    words = [
        f"iteration {record.step:8d}/{record.total_steps:8d}",
        f"consumed samples: {record.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {record.seconds * 1e3:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {record.flops_per_device / 1e12:.4g}",
        f"tokens per second: {record.tokens_per_second:.1f}",
    ]
    if record.mfu is not None:
        words.append(f"MFU: {100 * record.mfu:.1f}%")
    words += [
        f"learning rate: {record.learning_rate:.6E}",
        f"global batch size: {record.global_batch_size:5d}",
        f"lm loss: {record.loss:.6E}",
    ]
    words += [f"{MEGATRON_NAMES.get(name, name)}: {value:.6E}" for name, value in record.aux_losses.items()]
    words.append(f"grad norm: {record.grad_norm:.3f}")
    if record.routing is not None:
        words += [
            f"max violation: {record.routing.max_violation:.3f}",
            f"drop rate: {100 * record.routing.drop_rate:.2f}%",
            f"router entropy: {record.routing.entropy:.3f}",
            f"dead experts: {record.routing.dead_experts}",
        ]
    words += [f"{name}: {value:.6g}" for name, value in (record.gpu or {}).items()]
    return " " + " | ".join(words) + " |"


def setup_logging(rank: int, log_dir: Path | None) -> None:
    """Log to the console, and for rank 0 to log_dir/log.txt as well. Other ranks say warnings only."""
    form = logging.Formatter(f"%(asctime)s [rank {rank}] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if log_dir is not None and rank == 0:
        log_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_dir / "log.txt"))
    for handler in handlers:
        handler.setFormatter(form)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=handlers, force=True)


class Pace:
    """Time since the last log line."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start = time.monotonic()
        self._steps = 0

    def step(self) -> None:
        """One more was made."""
        self._steps += 1

    def seconds_per_step(self) -> float:
        return (time.monotonic() - self._start) / max(1, self._steps)
