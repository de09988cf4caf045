"""A lost peer is told from a mistake of this rank."""

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError

from megatron_moe.config.errors import PeerError
from megatron_moe.parallel.peers import as_peer_error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
                "[10.0.0.7]:15781. This is typically caused by a remote worker crashing. Check the logs."
            ),
            "Connection closed by peer [10.0.0.7]:15781",
        ),
        (
            RuntimeError(
                "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms for recv"
            ),
            "Timed out waiting 1000ms for recv",
        ),
        (
            DistBackendError("NCCL communicator was aborted on rank 3.\nC++ stack"),
            "NCCL communicator was aborted on rank 3.",
        ),
        (DistNetworkError("The client socket has timed out after 600000ms"), "The client socket has timed out"),
    ],
)
def test_what_gloo_nccl_and_the_store_say_becomes_one_line(error: RuntimeError, reason: str) -> None:
    found = as_peer_error(error, rank=2)
    assert isinstance(found, PeerError) and found.exit_code == 86
    assert f"rank 2 lost another rank: {reason}" in str(found)
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("gloo is a word"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_mistake_of_this_rank_is_none(error: RuntimeError) -> None:
    assert as_peer_error(error, rank=0) is None
