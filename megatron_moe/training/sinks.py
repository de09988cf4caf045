"""Where figures are kept: JSON lines always, TensorBoard when asked for."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_moe.config.optional import require
from megatron_moe.training.console import MEGATRON_NAMES, StepRecord
from megatron_moe.training.metrics import LayerStats

logger = logging.getLogger(__name__)


class JsonLines:
    """A file of one JSON object a line; lines of steps that will be done again are dropped when it is opened."""

    def __init__(self, path: Path, start_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= start_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # the last line of a run that was killed while it wrote
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept))
        self._file = path.open("a")

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Sinks:
    """All sinks of one rank. One that fails is left out with a warning; training goes on."""

    def __init__(self, log_dir: Path | None, tensorboard_dir: Path | None, start_step: int) -> None:
        """start_step: finished steps of the run that goes on; later lines in the files are dropped."""
        self._broken: set[str] = set()
        self._metrics = JsonLines(log_dir / "metrics.jsonl", start_step) if log_dir else None
        self._routing = JsonLines(log_dir / "routing.jsonl", start_step) if log_dir else None
        self._board: Any = None
        if tensorboard_dir is not None:
            require("tensorboard", extra="log")
            writer = require("torch.utils.tensorboard", extra="log").SummaryWriter
            self._board = writer(str(tensorboard_dir), purge_step=start_step + 1)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, record: StepRecord, layers: LayerStats) -> None:
        """One log line's figures, and the load of every expert."""
        self._guard("metrics.jsonl", lambda: self._metrics and self._metrics.write(_flat(record)))
        load = {str(layer): stats["requested"].tolist() for layer, stats in layers.items()}
        if load:
            values = {"step": record.step, "requested": load}
            self._guard("routing.jsonl", lambda: self._routing and self._routing.write(values))
        self._guard("TensorBoard", lambda: self._write_board(record))

    def write_validation(self, step: int, loss: float, extra: dict[str, float]) -> None:
        """A validation loss in nats per token, and what else was measured on the validation text."""
        values = {"step": step, "validation_loss": loss, **extra}
        self._guard("metrics.jsonl", lambda: self._metrics and self._metrics.write(values))
        if self._board is not None:
            self._guard("TensorBoard", lambda: self._board.add_scalar("lm-loss-validation/lm loss", loss, step))

    def close(self) -> None:
        for sink in (self._metrics, self._routing, self._board):
            if sink is not None:
                self._guard("closing", sink.close)

    def _write_board(self, record: StepRecord) -> None:
        if self._board is None:
            return
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
            self._board.add_scalar(name, value, record.step)

    def _guard(self, name: str, write: Callable[[], Any]) -> None:
        if name in self._broken:
            return
        try:
            write()
        except (OSError, ValueError) as error:
            self._broken.add(name)
            logger.warning("%s cannot be written any more (%s); training goes on without it", name, error)


def _flat(record: StepRecord) -> dict[str, Any]:
    """The record in one level, for a line of JSON."""
    values = asdict(record)
    routing, gpu, aux = values.pop("routing"), values.pop("gpu"), values.pop("aux_losses")
    values |= {"tokens_per_second": record.tokens_per_second, "mfu": record.mfu, **aux}
    return values | (routing or {}) | (gpu or {})
