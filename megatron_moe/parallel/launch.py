"""Joining the ranks: from torchrun, from SLURM, or forked from this process for tests and tools."""

import multiprocessing
import multiprocessing.connection
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, Store, TCPStore

from megatron_moe.config.errors import ConfigError, PeerError
from megatron_moe.parallel.meeting import meet


@dataclass(frozen=True)
class Place:
    """This process among all: numbers only, before anything is joined."""

    rank: int
    world_size: int
    local_rank: int


# (rank, world size, local rank) as each launcher tells them
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


def find_place(environment: Mapping[str, str]) -> Place:
    """Read the launcher's variables; alone when there are none.

    Raises ConfigError when a launcher set only some of them.
    """
    for launcher, names in LAUNCHERS.items():
        found = [environment.get(name) for name in names]
        if launcher == "SLURM" and "SLURM_STEP_ID" not in environment:
            continue  # inside an allocation, but not started by srun: one process
        if found[0] is None:
            continue
        if None in found:
            missing = names[found.index(None)]
            raise ConfigError(
                f"{launcher} set {names[0]} but not {missing}; start the job through {launcher}, or unset {names[0]}."
            )
        rank, world_size, local_rank = (int(value) for value in found if value is not None)
        return Place(rank, world_size, local_rank)
    return Place(0, 1, 0)


def pick_device(place: Place) -> torch.device:
    """One GPU for each local rank where there are GPUs, otherwise the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {place.local_rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}. "
            f"Start at most that many processes here, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU."
        )
    return torch.device("cuda", place.local_rank)


def join(
    place: Place, device: torch.device, backend: str, timeout_minutes: float, environment: Mapping[str, str]
) -> None:
    """Enter the world. `backend` "auto" is NCCL on GPUs and gloo on CPUs. A world of one also gets its group."""
    name = ("nccl" if device.type == "cuda" else "gloo") if backend == "auto" else backend
    timeout = timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        name, store=_store(place, environment, timeout), rank=place.rank, world_size=place.world_size, timeout=timeout
    )


def _store(place: Place, environment: Mapping[str, str], timeout: timedelta) -> Store:
    if place.world_size == 1:
        return HashStore()
    address = first_host(environment)
    port = int(environment.get("MASTER_PORT") or _slurm_port(environment))
    # torchrun keeps a store of its own at this address; elsewhere rank 0 opens it
    agent_has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(address, port, place.world_size, place.rank == 0 and not agent_has_store, timeout)
    return meet(store, place.rank, place.world_size, timeout.total_seconds())


def first_host(environment: Mapping[str, str]) -> str:
    """Where rank 0 is, by a name or address that all ranks reach."""
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or ""
    if not hosts:
        raise ConfigError(
            "MASTER_ADDR is not set and SLURM names no hosts; start through torchrun or srun, or set MASTER_ADDR."
        )
    # "gpu[003-008,012],login1" -> gpu003;  "login1,gpu[003-008]" -> login1
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", hosts)
    if first is None:
        raise ConfigError(f"SLURM's list of hosts {hosts!r} cannot be read; set MASTER_ADDR to the first host.")
    return first[1] + (first[2] or "")


def on_one_machine(place: Place, environment: Mapping[str, str]) -> bool:
    """Whether all ranks are known to be on this machine."""
    if place.world_size == 1 or environment.get("LOCAL_WORLD_SIZE") == str(place.world_size):
        return True
    return environment.get("MASTER_ADDR", "") in ("localhost", "127.0.0.1", "::1")


def _slurm_port(environment: Mapping[str, str]) -> int:
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        raise ConfigError("MASTER_PORT is not set and there is no SLURM_JOB_ID to derive it from; set MASTER_PORT.")
    return 20000 + int(job) % 20000


def leave() -> None:
    """Give the process groups back; harmless when none were made."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fork_ranks(
    world_size: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0, backend: str = "gloo"
) -> list[Any]:
    """Run work(rank, world_size, *arguments) on ranks forked from this process; returns their results in order.

    Forking a process that has imported torch starts 8 ranks in 0.2 s. This process must have called
    torch.set_num_threads(1) before any parallel operation: a forked OpenMP pool hangs; and it must not have used a GPU.
    Raises PeerError with the first rank's traceback when one fails.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(
                target=_forked,
                args=(rank, world_size, Path(folder) / "store", pipes[rank][1], backend, work, arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            results = _collect([receiver for receiver, _ in pipes], timeout_s)
        except PeerError:
            for process in ranks:
                process.kill()
            raise
        finally:
            for process in ranks:
                process.join()
        return results


def _collect(receivers: list[Connection], timeout_s: float) -> list[Any]:
    results: list[Any] = [None] * len(receivers)
    waiting = dict(enumerate(receivers))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=timeout_s)
        if not ready:
            raise PeerError(f"ranks {sorted(waiting)} did not answer within {timeout_s:.0f} s")
        for rank in [rank for rank, receiver in waiting.items() if receiver in ready]:
            try:
                ok, value = waiting.pop(rank).recv()
            except EOFError:
                raise PeerError(f"rank {rank} died without a word") from None
            if not ok:
                raise PeerError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return results


def _forked(
    rank: int,
    world_size: int,
    store: Path,
    sender: Connection,
    backend: str,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend,
            store=FileStore(str(store), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        answer = (True, work(rank, world_size, *arguments))
    except BaseException:  # the parent must hear of everything, SystemExit too
        answer = (False, traceback.format_exc())
    sender.send(answer)
    sender.close()
    if answer[0]:
        dist.barrier()  # a peer may still be connecting to this rank
    # interpreter shutdown of a fork is slow
    os._exit(0)
