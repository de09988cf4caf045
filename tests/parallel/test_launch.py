"""Finding one's place, and ranks forked for tests: what they answer, and what is said when one fails."""

import os
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_moe.config.errors import ConfigError, PeerError
from megatron_moe.parallel.launch import Place, find_place, fork_ranks, pick_device

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0)),
        (TORCHRUN, Place(5, 8, 1)),
        (SLURM, Place(3, 4, 0)),
        ({**SLURM, **TORCHRUN}, Place(5, 8, 1)),  # torchrun started by srun: the inner one counts
        ({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_ID"}, Place(0, 1, 0)),  # a shell in an allocation
    ],
)
def test_the_place_is_what_the_launcher_says(environment: dict[str, str], place: Place) -> None:
    assert find_place(environment) == place


@pytest.mark.parametrize(("environment", "missing"), [(TORCHRUN, "LOCAL_RANK"), (SLURM, "SLURM_NTASKS")])
def test_half_a_launcher_is_refused(environment: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"but not {missing}"):
        find_place({name: value for name, value in environment.items() if name != missing})


def test_each_local_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(Place(5, 8, 1)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="local rank 2 has no GPU of its own: this machine shows 2"):
        pick_device(Place(2, 8, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Place(2, 8, 2)) == torch.device("cpu")


def answer(rank: int, world_size: int, word: str) -> dict[str, Any]:
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    return {"rank": rank, "world": world_size, "word": word, "total": total.item(), "process": os.getpid()}


def test_ranks_answer_in_their_order() -> None:
    found = fork_ranks(3, answer, "x")
    assert [(one["rank"], one["world"], one["word"], one["total"]) for one in found] == [
        (rank, 3, "x", 3.0) for rank in range(3)
    ]
    assert len({one["process"] for one in found} | {os.getpid()}) == 4


def fail(rank: int, world_size: int, how: str) -> None:
    if rank != 1:
        return
    if how == "raises":
        raise KeyError("the second rank")
    if how == "leaves":
        sys.exit("no more")
    if how == "dies":
        os._exit(9)
    if how == "hangs":
        time.sleep(60)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "(?s)rank 1 failed:.*KeyError: 'the second rank'"),
        ("leaves", "(?s)rank 1 failed:.*SystemExit: no more"),
        ("dies", "rank 1 died without a word"),
    ],
)
def test_a_failing_rank_is_named_with_what_it_said(how: str, said: str) -> None:
    with pytest.raises(PeerError, match=said):
        fork_ranks(2, fail, how)


def test_a_rank_that_hangs_is_named_and_ended() -> None:
    started = time.monotonic()
    with pytest.raises(PeerError, match=r"ranks \[1\] did not answer within 1 s"):
        fork_ranks(2, fail, "hangs", timeout_s=1.0)
    assert time.monotonic() - started < 30
