"""Where figures are kept: JSON lines always, TensorBoard when asked for."""

import errno
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_moe.config.optional import require
from megatron_moe.config.whole_file import write_whole
from megatron_moe.training.console import MEGATRON_NAMES, StepRecord
from megatron_moe.training.metrics import LayerStats

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
ROUTING = "routing.jsonl"
BOARD = "TensorBoard"


class JsonLines:
    """A file of one JSON object a line; lines of steps that will be done again are dropped when it is opened."""

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.read_bytes() if path.exists() else b""
        kept = b"".join(line for line in written.splitlines(keepends=True) if _is_done(line, start_step))
        if kept != written:
            # the history of a long run: whole in either file, whenever this process is killed
            write_whole(path, kept)
        # without a buffer: nothing is left in it for later when the disk is full
        self._file = path.open("ab", buffering=0)

    def write(self, values: dict[str, Any]) -> None:
        """Raises OSError when the line does not fit on the disk."""
        line = json.dumps(values).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()


def _is_done(line: bytes, start_step: int) -> bool:
    """False also for the last line of a run that was killed while it wrote."""
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] <= start_step)
    except (ValueError, KeyError, TypeError):
        return False


class Sinks:
    """All sinks of one rank. One that fails is left out with a warning; training goes on."""

    def __init__(self, log_dir: Path | None, tensorboard_dir: Path | None, start_step: int) -> None:
        """start_step: finished steps of the run that goes on; later lines in the files are dropped."""
        self._log_dir, self._tensorboard_dir = log_dir, tensorboard_dir
        self._broken: set[str] = set()
        self._sinks: dict[str, Any] = {}
        self._open_all(start_step)

    def go_back(self, step: int) -> None:
        """The run goes on after an earlier step: what was written since is dropped."""
        self.close()
        self._open_all(step)

    def _open_all(self, start_step: int) -> None:
        if self._log_dir is not None:
            for name in (METRICS, ROUTING):
                self._guard(name, partial(self._open, name, JsonLines, self._log_dir / name, start_step))
        if self._tensorboard_dir is not None:
            require("tensorboard", extra="log")
            writer, folder = require("torch.utils.tensorboard", extra="log").SummaryWriter, str(self._tensorboard_dir)
            self._guard(BOARD, partial(self._open, BOARD, writer, folder, purge_step=start_step + 1))

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, record: StepRecord, layers: LayerStats) -> None:
        """One log line's figures, and the load of every expert."""
        self._put(METRICS, lambda sink: sink.write(_flat(record)))
        load = {str(layer): stats["requested"].tolist() for layer, stats in layers.items()}
        if load:
            self._put(ROUTING, lambda sink: sink.write({"step": record.step, "requested": load}))
        self._put(BOARD, lambda sink: _write_board(sink, record))

    def write_validation(self, step: int, loss: float, extra: dict[str, float]) -> None:
        """A validation loss in nats per token, and what else was measured on the validation text."""
        self._put(METRICS, lambda sink: sink.write({"step": step, "validation_loss": loss, **extra}))
        self._put(BOARD, lambda sink: sink.add_scalar("lm-loss-validation/lm loss", loss, step))

    def close(self) -> None:
        """Also closes those that failed before."""
        for name, sink in self._sinks.items():
            self._guard(name, sink.close)
        self._sinks.clear()

    def _open(self, name: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self._sinks[name] = make(*arguments, **options)

    def _put(self, name: str, write: Callable[[Any], None]) -> None:
        if name in self._sinks and name not in self._broken:
            self._guard(name, partial(write, self._sinks[name]))

    def _guard(self, name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except (OSError, ValueError) as error:
            if name not in self._broken:
                logger.warning("%s cannot be written any more (%s); training goes on without it", name, error)
            self._broken.add(name)


def _write_board(board: Any, record: StepRecord) -> None:
    values = {
        "lm loss": record.loss,
        "learning-rate": record.learning_rate,
        "grad-norm": record.grad_norm,
        "iteration-time": record.seconds,
        "throughput": record.flops_per_device / 1e12,
        **{MEGATRON_NAMES.get(name, name): value for name, value in record.aux_losses.items()},
    }
    if record.routing is not None:
        values |= {f"routing/{name}": value for name, value in asdict(record.routing).items()}
    for name, value in values.items():
        board.add_scalar(name, value, record.step)


def _flat(record: StepRecord) -> dict[str, Any]:
    """The record in one level, for a line of JSON."""
    values = asdict(record)
    routing, gpu, aux = values.pop("routing"), values.pop("gpu"), values.pop("aux_losses")
    values |= {"tokens_per_second": record.tokens_per_second, "mfu": record.mfu, **aux}
    return values | (routing or {}) | (gpu or {})
