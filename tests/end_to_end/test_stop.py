"""How a job ends that was asked to stop, lost a rank, or met numbers that are none."""

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.config.errors import DataError, NonFiniteError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.data.hashes import hashes_path
from megatron_moe.data.tokenizer import build_tokenizer
from megatron_moe.launch import children
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training import trainer as trainer_module
from megatron_moe.training.engine import StepResult, grid_of
from megatron_moe.training.restarts import FILE
from megatron_moe.training.trainer import Trainer
from tests.end_to_end.commands import (
    LAUNCH,
    PRETRAIN,
    call,
    fingerprint,
    start,
    steps_in,
    wait_until,
    whole_checkpoint,
    write_recipe,
)
from tests.end_to_end.tiny_job import CPU, GLOBAL_BATCH, job, write_corpus
from tests.faults.mortal import DONE, in_child

LONG = 1_000_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def long_job(corpus: Path, folder: Path, **checkpoint: object) -> RunConfig:
    return job(
        corpus,
        training={"train_iters": LONG},
        checkpoint={"save": str(folder / "saved"), "load": "latest", **checkpoint},
        logging={"log_dir": str(folder / "log")},
    )


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGTERM, LAUNCH), (signal.SIGUSR1, LAUNCH), (signal.SIGTERM, PRETRAIN), (signal.SIGINT, PRETRAIN)],
    ids=["SIGTERM to two ranks", "SIGUSR1 to two ranks", "SIGTERM to one process", "Ctrl-C"],
)
def test_a_signal_ends_the_job_with_75_and_it_goes_on_with_the_next_step(
    number: signal.Signals, how: Sequence[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, long_job(corpus, tmp_path))
    process = start(*how, "--config", str(recipe))
    wait_until(lambda: len(steps_in(tmp_path / "log")) >= 3, process)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said

    steps = steps_in(tmp_path / "log")
    stopped = steps[-1]
    assert f"stopped by a signal after step {stopped}; the checkpoint is written" in out
    checkpoint = whole_checkpoint(tmp_path / "saved")
    assert (checkpoint.step, checkpoint.state["loader"]) == (stopped, {"consumed_samples": stopped * GLOBAL_BATCH})

    assert call("--config", str(recipe), "--exit-interval", "1") == 0
    assert f"resuming after step {stopped} ({stopped * GLOBAL_BATCH} samples)" in capsys.readouterr().out
    assert steps_in(tmp_path / "log") == [*steps, stopped + 1]
    assert whole_checkpoint(tmp_path / "saved").step == stopped + 1


def test_a_file_ends_the_job_with_75_and_it_goes_on_once_the_file_is_gone(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    switch = tmp_path / "stop"
    command = ("--config", str(write_recipe(tmp_path, long_job(corpus, tmp_path))), "--kill-switch-file", str(switch))
    process = start(*LAUNCH, *command)
    wait_until(lambda: len(steps_in(tmp_path / "log")) >= 3, process)
    switch.touch()
    out, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said

    steps = steps_in(tmp_path / "log")
    stopped = steps[-1]
    assert f"stopped by the file {switch} after step {stopped}; the checkpoint is written, exit code 75" in out
    checkpoint = whole_checkpoint(tmp_path / "saved")
    assert (checkpoint.step, checkpoint.state["loader"]) == (stopped, {"consumed_samples": stopped * GLOBAL_BATCH})

    before = fingerprint(tmp_path)
    assert call(*command, "--lr", "0.5") == 75
    assert f"stopped by the file {switch} before the first step; nothing was trained" in capsys.readouterr().out
    after = fingerprint(tmp_path)
    assert {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)} == {"log/log.txt"}

    switch.unlink()
    assert call(*command, "--exit-interval", "1") == 0
    assert steps_in(tmp_path / "log") == [*steps, stopped + 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_the_model_is_built_ends_the_job_with_75_too(
    number: signal.Signals, corpus: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, long_job(corpus, tmp_path))

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return build_tokenizer(*arguments)

    def work() -> None:
        with mock.patch.object(trainer_module, "build_tokenizer", signalled):
            assert call("--config", str(recipe)) == 75

    said = tmp_path / "said"
    assert in_child(work, under=tmp_path, log=said) == DONE, said.read_text()
    assert "stopped by a signal before the first step; nothing was trained" in said.read_text()
    assert not (tmp_path / "saved").exists()


def test_numbers_that_are_none_end_a_job_with_16_and_the_last_good_checkpoint(corpus: Path, tmp_path: Path) -> None:
    assert call("--config", str(write_recipe(tmp_path, long_job(corpus, tmp_path))), "--exit-interval", "3") == 0
    before = fingerprint(tmp_path / "saved")

    # after an update by 1e38 the squares in a norm are infinite
    far = start(*LAUNCH, "--config", str(tmp_path / "job.json"), "--lr", "1e38", "--lr-warmup-iters", "0")
    _, said = far.communicate(timeout=60)
    assert far.returncode == 16, said
    assert said.count("megatron_moe: step 5: ") == 1 and "is not finite" in said
    assert f"The last good checkpoint is step 3 in {tmp_path / 'saved'}" in said
    assert fingerprint(tmp_path / "saved").keys() - before.keys() == {FILE}
    (tmp_path / "saved" / FILE).unlink()
    assert fingerprint(tmp_path / "saved") == before
    assert whole_checkpoint(tmp_path / "saved").step == 3


def poison(rank: int, world_size: int, text: str) -> list[str]:
    """A weight of rank 1 becomes NaN before step 4; returns what the run ended with, and whether it changed weights."""
    config = RunConfig.from_json(text)
    trainer = Trainer(config, ParallelState.distributed(grid_of(config, world_size)), CPU)
    train = trainer.engine.train_step
    weights = [parameter for module in trainer.engine.modules for parameter in module.parameters()]
    before: list[torch.Tensor] = []

    def poisoned(step: int, batches: Sequence[Batch], last_checkpoint: str | None = None) -> StepResult:
        if step + 1 == 4:
            if rank == 1:
                weights[0].data.view(-1)[:] = float("nan")
            before.extend(weight.detach().clone() for weight in weights)
        return train(step, batches, last_checkpoint)

    trainer.engine.train_step = poisoned  # type: ignore[method-assign]
    try:
        return [f"ended with {trainer.run()}"]
    except NonFiniteError as error:
        same = all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, weights, strict=True))
        return [str(error), f"weights unchanged: {same}"]


@pytest.mark.parametrize("background", [True, False], ids=["saved beside", "saved at once"])
def test_the_rank_with_the_bad_loss_is_named_and_what_was_being_saved_is_kept(
    background: bool, corpus: Path, tmp_path: Path
) -> None:
    config = long_job(corpus, tmp_path, save_interval=3, async_save=background)
    answers = run_on_ranks(2, poison, config.to_json())
    assert answers[0] == answers[1]
    message, unchanged = answers[0]
    assert message.startswith("step 4: the loss of rank 1 is not finite")
    assert f"The last good checkpoint is step 3 in {tmp_path / 'saved'}" in message
    assert unchanged == "weights unchanged: True"
    assert whole_checkpoint(tmp_path / "saved").step == 3


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start_rank(rank: int, port: str, *arguments: str) -> subprocess.Popen[str]:
    """One of two ranks, as SLURM would start it: each on its own, nobody watches them."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    return start(*PRETRAIN, *arguments, variables=place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})


def test_a_rank_that_dies_takes_the_others_along_with_86_and_a_line(corpus: Path, tmp_path: Path) -> None:
    recipe, port = str(write_recipe(tmp_path, long_job(corpus, tmp_path))), free_port()
    ranks = [start_rank(rank, port, "--config", recipe) for rank in (0, 1)]
    wait_until(lambda: len(steps_in(tmp_path / "log")) >= 2, ranks[0])
    ranks[1].kill()
    # what it died of can be read until its parent asks
    ranks[0].wait(timeout=60)
    ranks[1].communicate(timeout=60)
    _, said = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 86, said
    lines = [line for line in said.splitlines() if line.startswith("megatron_moe: ")]
    assert len(lines) == 1 and lines[0].startswith("megatron_moe: rank 0 lost another rank: ")
    assert f"rank 1 (host {os.uname().nodename}, pid {ranks[1].pid}) was killed by SIGKILL, in step " in lines[0]
    assert "[127.0.0.1]" in lines[0]
    assert "Traceback" not in said


def test_a_stopped_rank_ends_the_job_with_87_and_a_report(corpus: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, long_job(corpus, tmp_path)))
    process = start(*LAUNCH, "--config", recipe, "--hang-timeout-s", "5")
    wait_until(lambda: len(steps_in(tmp_path / "log")) >= 2, process)
    ranks = [child for child in children(process.pid) if b"megatron_moe.pretrain" in command_line(child)]
    os.kill(ranks[1], signal.SIGSTOP)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 87, said
    report = (tmp_path / "log" / "hang.txt").read_text()
    assert report in said and "its process is stopped" in report.partition("\n")[0]
    assert f"pid {ranks[1]}) hangs: no progress for " in report
    assert "in train_step" in report


def test_a_rank_alone_that_hangs_ends_with_87(corpus: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, long_job(corpus, tmp_path)))
    process = start(*PRETRAIN, "--config", recipe, "--hang-timeout-s", "5")
    wait_until(lambda: len(steps_in(tmp_path / "log")) >= 2, process)
    os.kill(process.pid, signal.SIGSTOP)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 87, said
    assert "rank 0 (host " in said and "its process was stopped by a signal (state T)" in said


def test_the_launcher_says_that_a_rank_was_killed(corpus: Path, tmp_path: Path) -> None:
    process = start(*LAUNCH, "--config", str(write_recipe(tmp_path, long_job(corpus, tmp_path))))
    wait_until(lambda: len(steps_in(tmp_path / "log")) >= 2, process)
    ranks = [child for child in children(process.pid) if b"megatron_moe.pretrain" in command_line(child)]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    # whichever end is noticed first: that of the killed rank, or of the one that lost it
    assert process.returncode in (86, 128 + signal.SIGKILL), said
    assert "Traceback" not in said


def command_line(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def test_an_error_of_one_rank_alone_ends_all_ranks_alike(corpus: Path, tmp_path: Path) -> None:
    recipe, port = str(write_recipe(tmp_path, long_job(corpus, tmp_path))), free_port()
    ranks = [
        start_rank(0, port, "--config", recipe),
        start_rank(1, port, "--config", recipe, "--data-path", str(tmp_path / "not here")),
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [65, 65], said
    assert f"megatron_moe: rank 1: no corpus at '{tmp_path / 'not here'}'" in said[0]
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "saved").exists()


def meet_bad_token(rank: int, world_size: int, text: str) -> str:
    config = RunConfig.from_json(text)
    trainer = Trainer(config, ParallelState.distributed(grid_of(config, world_size)), CPU)
    try:
        return f"ended with {trainer.run()}"
    except DataError as error:
        return f"step {trainer.step}: {error}"


def test_a_token_that_one_rank_cannot_read_ends_all_ranks_alike(tmp_path: Path) -> None:
    # one document in which a single token is too large: few samples hold it
    corpus = write_corpus(tmp_path / "tokens")
    tokens = bytearray(Path(f"{corpus}.bin").read_bytes())
    tokens[200:202] = (60_000).to_bytes(2, "little")
    Path(f"{corpus}.bin").write_bytes(tokens)
    hashes_path(corpus).unlink()  # as of a pair that was written so: its hashes would tell of a change first
    answers = run_on_ranks(4, meet_bad_token, job(corpus, training={"train_iters": 100}).to_json())
    assert len(set(answers)) == 1
    assert "rank " in answers[0] and "holds token 60000 as number 100 of its tokens" in answers[0]
    assert "but the vocabulary ends at 60" in answers[0]
