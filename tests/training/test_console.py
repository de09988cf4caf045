"""The log line, which people's scripts read, and where it goes."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_moe.training.console import log_line, setup_logging
from tests.training.samples import DENSE, RECORD, record


def words(line: str) -> list[str]:
    """The names before the colons, in order."""
    return [part.partition(":")[0].strip() for part in line.strip().rstrip("|").split(" | ")]


def test_the_line_has_megatrons_words_in_megatrons_order() -> None:
    # iteration i/N, consumed samples, elapsed, throughput, learning rate, batch size, losses, grad norm
    megatron = [
        "iteration       20/     300",
        "consumed samples",
        "elapsed time per iteration (ms)",
        "throughput per GPU (TFLOP/s/GPU)",
        "learning rate",
        "global batch size",
        "lm loss",
        "load_balancing_loss",
        "z_loss",
        "grad norm",
    ]
    assert [word for word in words(log_line(RECORD)) if word in megatron] == megatron


def test_the_whole_line_of_a_sparse_model() -> None:
    assert log_line(RECORD) == (
        " iteration       20/     300 | consumed samples:          320 | elapsed time per iteration (ms): 250.0 |"
        " throughput per GPU (TFLOP/s/GPU): 8 | tokens per second: 32768.0 | MFU: 10.0% | learning rate: 6.000000E-04 |"
        " global batch size:    16 | lm loss: 5.500000E+00 | load_balancing_loss: 1.250000E+00 | z_loss: 3.500000E+00 |"
        " grad norm: 1.750 | max violation: 0.500 | drop rate: 12.50% | router entropy: 1.500 | dead experts: 2 |"
    )


def test_a_dense_model_on_an_unknown_device_says_nothing_of_routing_or_mfu() -> None:
    line = log_line(DENSE)
    assert words(line)[-2:] == ["lm loss", "grad norm"]
    assert "MFU" not in line


def test_readings_of_the_gpu_stand_at_the_end() -> None:
    assert log_line(record(1, gpu={"gpu power (W)": 512.25})).endswith("| gpu power (W): 512.25 |")


def test_what_follows_from_the_figures() -> None:
    assert RECORD.tokens_per_second == 8192 / 0.25
    assert RECORD.flops_per_device == 8e12 / 0.25 / 4
    assert RECORD.mfu == pytest.approx(0.1)
    assert DENSE.mfu is None


@pytest.fixture
def own_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    level = logging.root.level
    monkeypatch.setattr(logging.root, "handlers", [])
    yield
    for handler in logging.root.handlers:
        handler.close()
    logging.root.setLevel(level)


@pytest.mark.usefixtures("own_handlers")
def test_rank_0_tells_the_console_and_the_file_and_goes_on_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in ("before", "after"):
        setup_logging(0, tmp_path / "logs")
        logging.getLogger("megatron_moe.some").info("%s the restart", word)
    told = capsys.readouterr().out.splitlines()
    assert [line.split("] ")[1] for line in told] == ["before the restart", "after the restart"]
    assert told[0].split(" [")[1].startswith("rank 0]")
    assert (tmp_path / "logs" / "log.txt").read_text().splitlines() == told


@pytest.mark.usefixtures("own_handlers")
def test_other_ranks_only_warn_and_only_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(3, tmp_path / "logs")
    logging.getLogger("megatron_moe.some").info("quiet")
    logging.getLogger("megatron_moe.some").warning("loud")
    assert capsys.readouterr().out.strip().endswith("[rank 3] loud")
    assert not (tmp_path / "logs").exists()
