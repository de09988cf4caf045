"""What is kept of a run: whole after a resume, and never a reason to stop."""

import json
import logging
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_moe.config.errors import ConfigError
from megatron_moe.training.sinks import JsonLines, Sinks
from tests.training.samples import DENSE, layer_stats, record

STATS = layer_stats([3, 1], [2, 1], 4, 1, 0.5)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


def test_each_log_line_is_one_line_of_json(tmp_path: Path) -> None:
    with Sinks(tmp_path, None, 0) as sinks:
        sinks.write(record(10, gpu={"gpu power (W)": 500.0}), STATS)
        sinks.write_validation(10, 5.25, {"bits per byte": 2.5})
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first["step"] == 10
    assert first["loss"] == 5.5
    assert first["load_balance_loss"] == 1.25
    assert first["max_violation"] == 0.5
    assert first["gpu power (W)"] == 500.0
    assert first["tokens_per_second"] == 32768.0
    assert first["mfu"] == pytest.approx(0.1)
    assert not any(isinstance(value, dict | list) for value in first.values())
    assert second == {"step": 10, "validation_loss": 5.25, "bits per byte": 2.5}
    assert lines(tmp_path / "routing.jsonl") == [{"step": 10, "requested": {"1": [3, 1]}}]


def test_a_dense_model_leaves_no_routing_lines(tmp_path: Path) -> None:
    with Sinks(tmp_path, None, 0) as sinks:
        sinks.write(DENSE, {})
    assert lines(tmp_path / "metrics.jsonl")[0]["mfu"] is None
    assert (tmp_path / "routing.jsonl").read_text() == ""


def test_lines_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with Sinks(tmp_path, None, 0) as sinks:
        for step in (1, 2):
            sinks.write(record(step), STATS)
            assert steps(tmp_path / "metrics.jsonl")[-1] == step


def test_resuming_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    with Sinks(tmp_path, None, 0) as sinks:
        for step in (1, 2, 3, 4):
            sinks.write(record(step), STATS)
        sinks.write_validation(4, 5.0, {})
    with Sinks(tmp_path, None, 2) as sinks:
        for step in (3, 4, 5):
            sinks.write(record(step), STATS)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert steps(tmp_path / "routing.jsonl") == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "routing.jsonl"]


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', "\x00\x00", '{"step": "two"}\n', "[2]\n", '{"loss": 1}\n', "2\n"])
def test_what_a_killed_run_left_half_written_is_dropped(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + tail)
    file = JsonLines(path, 5)
    file.write({"step": 2})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_history_that_stays_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino, path.stat().st_mtime_ns
    JsonLines(path, 5).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before


def fill_the_disk(rank: int, world_size: int, folder: str) -> tuple[list[str], list[int]]:
    """Warnings and file sizes of a run whose files may not grow over 1,000 bytes."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_moe").addHandler(handler)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with Sinks(Path(folder), None, 0) as sinks:
        for step in range(1, 9):
            sinks.write(record(step), STATS)
    return told, [(Path(folder) / name).stat().st_size for name in ("metrics.jsonl", "routing.jsonl")]


def test_a_full_disk_is_said_once_and_the_other_files_go_on(tmp_path: Path) -> None:
    ((told, sizes),) = run_on_ranks(1, fill_the_disk, str(tmp_path))
    assert len(told) == 1
    assert told[0].startswith("metrics.jsonl cannot be written any more")
    assert sizes[0] == 1000
    assert steps(tmp_path / "routing.jsonl") == list(range(1, 9))
    # the run that goes on drops the line that was cut
    JsonLines(tmp_path / "metrics.jsonl", 8).close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_folder_that_cannot_be_made_is_said_for_each_file_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with Sinks(tmp_path / "file", None, 0) as sinks:
        sinks.write(record(1), STATS)
        sinks.write_validation(1, 5.0, {})
    said = [item.getMessage().split()[0] for item in caplog.records]
    assert said == ["metrics.jsonl", "routing.jsonl"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_megatrons_tags_and_the_values(tmp_path: Path) -> None:
    with Sinks(None, tmp_path, 0) as sinks:
        sinks.write(record(10), STATS)
        sinks.write(record(20, loss=4.5), STATS)
        sinks.write_validation(20, 4.75, {})
    found = scalars(tmp_path)
    assert found["lm loss"] == [(10, 5.5), (20, 4.5)]
    assert found["load_balancing_loss"] == [(10, 1.25), (20, 1.25)]
    assert found["learning-rate"][0][1] == pytest.approx(6e-4)
    assert found["grad-norm"][0] == (10, 1.75)
    assert found["throughput"][0] == (10, 8.0)
    assert found["routing/drop_rate"][0] == (10, 0.125)
    assert found["lm-loss-validation/lm loss"] == [(20, 4.75)]


def test_tensorboard_shows_one_curve_after_a_resume(tmp_path: Path) -> None:
    with Sinks(None, tmp_path, 0) as sinks:
        for step in (1, 2, 3, 4):
            sinks.write(record(step, loss=float(step)), STATS)
    with Sinks(None, tmp_path, 2) as sinks:
        sinks.write(record(3, loss=30.0), STATS)
    assert scalars(tmp_path)["lm loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


class FailingBoard:
    def __init__(self, folder: str, purge_step: int) -> None:
        self.calls = 0

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.fixture
def failing_board(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", FailingBoard)
    yield


@pytest.mark.usefixtures("failing_board")
def test_a_failing_tensorboard_is_said_once_and_the_files_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Sinks(tmp_path, tmp_path / "board", 0) as sinks:
        for step in (1, 2, 3):
            sinks.write(record(step), STATS)
    assert [item.getMessage() for item in caplog.records] == [
        "TensorBoard cannot be written any more ([Errno 28] No space left on device); training goes on without it"
    ]
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"megatron_moe\[log\]"):
        Sinks(None, tmp_path, 0)


def test_integers_of_the_device_become_numbers_of_json(tmp_path: Path) -> None:
    with Sinks(tmp_path, None, 0) as sinks:
        sinks.write(record(1), {0: {"requested": torch.tensor([2, 5])}})
    assert lines(tmp_path / "routing.jsonl")[0]["requested"] == {"0": [2, 5]}
