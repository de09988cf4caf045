"""Ranks that die and come back, in worlds that shrink and grow, meet in the store that torchrun keeps."""

import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from goals import Trials
from torch._C._distributed_c10d import TCPStore

from megatron_moe.parallel.launch import Place, join, leave

CPU = torch.device("cpu")


def rank_of_a_start(place: Place, port: int, count: int, victim: bool) -> None:
    """Joins, adds up all ranks' numbers, and ends as a rank does that finished, or that was killed in a collective."""
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(count),
    }
    torch.set_num_threads(1)
    join(place, CPU, "gloo", 1.0, environment)
    numbers = torch.tensor([place.rank + 1.0])
    dist.all_reduce(numbers)
    if victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if numbers.item() != place.world_size * (place.world_size + 1) / 2:
        os._exit(3)
    try:
        dist.barrier()  # broken where a rank was killed
    except RuntimeError:
        os._exit(86)
    leave()
    os._exit(0)


@contextmanager
def agent() -> Iterator[int]:
    """The store of torchrun's agent; gives its port. In another process: ranks are forked from one without threads."""
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        os.write(tell, str(store.port).encode())
        signal.pause()
        os._exit(1)
    try:
        yield int(os.read(told, 16))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)
        os.close(tell)


def start(port: int, counts: list[int], victim: int | None) -> list[int]:
    """One start, forked; the ranks' exit codes, negative for a signal."""
    pids = []
    for rank, count in enumerate(counts):
        pid = os.fork()
        if not pid:
            try:
                rank_of_a_start(Place(rank, len(counts), rank), port, count, victim == rank)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.mark.goal(
    "R23", ci=20, nightly=300, what="a rank killed, a world of other size, counts of restarts that differ: all meet"
)
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_ranks_meet_again_in_the_store_of_the_starts_before(trials: Trials) -> None:
    with agent() as port:
        for number, rng in trials:
            # each node's agent counts its own restarts: one that joined later, or was not to blame, has counted fewer
            counts = [rng.randint(0, 1) for _ in range(rng.choice([2, 3]))]
            victim = rng.choice([None, *range(len(counts))])
            codes = start(port, counts, victim)
            others = 0 if victim is None else 86
            expected = [-signal.SIGKILL if rank == victim else others for rank in range(len(counts))]
            assert codes == expected, (number, counts)
