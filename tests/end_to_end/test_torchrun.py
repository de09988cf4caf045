"""torchrun starts ranks again, and goes on with fewer: the job ends as one that was never disturbed."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.load import CheckpointReader
from megatron_moe.config.run import RunConfig
from megatron_moe.launch import children
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import grid_of
from megatron_moe.training.trainer import Trainer
from tests.end_to_end.commands import PRETRAIN, start, steps_in, wait_until, whole_checkpoint, write_recipe
from tests.end_to_end.tiny_job import CPU, GLOBAL_BATCH, job, write_corpus

STEPS = 60
# torch's own, with nothing around it and nothing set
TORCHRUN = ("-m", "torch.distributed.run", "--max-restarts", "2")


def train(rank: int, world_size: int, text: str) -> int:
    config = RunConfig.from_json(text)
    state = ParallelState.alone() if world_size == 1 else ParallelState.distributed(grid_of(config, world_size))
    return Trainer(config, state, CPU).run()


def tiny(folder: Path, **changes: Any) -> RunConfig:
    """A job that saves every five steps, under `folder`."""
    changes = {"training": {"train_iters": STEPS}, **changes}
    saving = {"save": str(folder / "saved"), "load": "latest", "save_interval": 5, "keep": 2}
    return job(folder.parent / "tokens", checkpoint=saving, logging={"log_dir": str(folder / "log")}, **changes)


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    """The folder of a job over two ranks that nothing befell."""
    write_corpus(tmp_path / "tokens")
    folder = tmp_path / "undisturbed"
    assert run_on_ranks(2, train, tiny(folder).to_json()) == [0, 0]
    return folder


def ranks_of(launcher: "subprocess.Popen[str]") -> list[int]:
    """Process ids of the ranks that it runs now."""
    found = [(child, Path(f"/proc/{child}/cmdline").read_bytes()) for child in children(launcher.pid)]
    return [child for child, command in found if b"megatron_moe.pretrain" in command]


def losses(folder: Path) -> list[tuple[int, int, float, int]]:
    """Step, samples that were read, loss and number of ranks of each line of the log."""
    lines = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["consumed_samples"], line["loss"], line["world_size"]) for line in lines]


def contents(reader: CheckpointReader) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All of model, optimizer and state."""
    files = {path.name: path.read_bytes() for path in reader.folder.iterdir() if path.suffix == ".safetensors"}
    return files, reader.state


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.goal("R23", ci=1, nightly=20, what="torchrun --max-restarts, a rank killed: the same final state")
def test_torchrun_starts_a_killed_rank_again_and_the_job_ends_the_same(
    undisturbed: Path, tmp_path: Path, trials: Trials
) -> None:
    for number, rng in trials:
        folder = tmp_path / f"trial{number}"
        folder.mkdir()
        recipe = write_recipe(folder, tiny(folder))
        process = start(*TORCHRUN, "--standalone", "--nproc-per-node", "2", *PRETRAIN, "--config", str(recipe))
        when = rng.randint(1, STEPS // 2)
        wait_until(lambda folder=folder, when=when: len(steps_in(folder / "log")) >= when, process, 600)  # type: ignore[misc]
        os.kill(rng.choice(ranks_of(process)), signal.SIGKILL)
        out, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
        assert "resuming after step" in out or when < 10, out
        assert contents(whole_checkpoint(folder / "saved")) == contents(whole_checkpoint(undisturbed / "saved"))
        assert losses(folder) == losses(undisturbed)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def agent(port: str, *arguments: str) -> "subprocess.Popen[str]":
    """A node of one rank, in a job of one or two nodes."""
    joining = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job")
    # a node that is lost is noticed after two seconds; a node that saves has five to come to the next meeting
    quick = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=2"
    nodes = ("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-conf", quick)
    return start(*TORCHRUN, *nodes, *joining, *PRETRAIN, *arguments)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.night
@pytest.mark.goal(
    "R12", ci=1, nightly=5, what="one of 2 elastic agents killed: the other goes on in a fallback layout"
)
def test_a_lost_node_leaves_a_job_in_another_layout_with_the_same_samples(tmp_path: Path, trials: Trials) -> None:
    write_corpus(tmp_path / "tokens")
    wide: dict[str, Any] = {"precision": {"dtype": "fp64"}, "training": {"train_iters": STEPS}}
    assert run_on_ranks(1, train, tiny(tmp_path / "alone", **wide).to_json()) == [0]
    layout = {"tensor_model_parallel_size": 2, "fallback_layouts": ["tp=1"]}
    for number, rng in trials:
        folder = tmp_path / f"trial{number}"
        folder.mkdir()
        recipe = write_recipe(folder, tiny(folder, parallel=layout, **wide))
        port = free_port()
        nodes = [agent(port, "--config", str(recipe)) for _ in range(2)]
        when = rng.randint(5, STEPS // 3)
        wait_until(lambda folder=folder, when=when: len(steps_in(folder / "log")) >= when, nodes[0], 600)  # type: ignore[misc]
        # the other keeps the store
        stays, leaves = nodes if listens(nodes[0], port) else reversed(nodes)
        for lost in (*ranks_of(leaves), leaves.pid):
            os.kill(lost, signal.SIGKILL)
        leaves.communicate(timeout=60)
        out, said = stays.communicate(timeout=600)
        assert stays.returncode == 0, said
        check_goes_on(losses(folder), losses(tmp_path / "alone"))
        before = sum(size == 2 for _, _, _, size in losses(folder))
        assert "fallback" in out and f"resuming after step {before} " in out, out


def listens(process: "subprocess.Popen[str]", port: str) -> bool:
    """Whether it is this process that listens at a port of this machine (Linux)."""
    files = Path(f"/proc/{process.pid}/fd").iterdir()
    sockets = {os.readlink(file)[len("socket:[") : -1] for file in files if os.readlink(file).startswith("socket:")}
    table = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return any(row[1].endswith(f":{int(port):04X}") and row[3] == "0A" and row[9] in sockets for row in table)


def check_goes_on(log: list[tuple[int, int, float, int]], whole: list[tuple[int, int, float, int]]) -> None:
    """Each step once, first on two ranks and then on one, with its own samples and the loss of one rank alone."""
    assert [step for step, _, _, _ in log] == list(range(1, STEPS + 1))
    assert [consumed for _, consumed, _, _ in log] == [step * GLOBAL_BATCH for step in range(1, STEPS + 1)]
    sizes = [size for _, _, _, size in log]
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == {1, 2}
    for (step, _, found, _), (_, _, expected, _) in zip(log, whole, strict=True):
        assert found == pytest.approx(expected, rel=1e-9), step
