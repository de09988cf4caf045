"""Which core mixes values where sequences are cut, by the name that --cp-comm-type gives it."""

from collections.abc import Callable

from megatron_moe.layers.all_to_all_attention import AllToAllAttention
from megatron_moe.layers.attention_core import AttentionCore, GatheredAttention
from megatron_moe.layers.ring_attention import RingAttention
from megatron_moe.parallel.state import Axis

CORES: dict[str, Callable[[Axis], AttentionCore]] = {
    "all_gather": GatheredAttention,
    "p2p": RingAttention,
    "a2a": AllToAllAttention,
}


def build_core(kind: str, cp: Axis) -> AttentionCore:
    """A rank that holds whole sequences has nothing to send: torch's own attention, whatever the kind."""
    if cp.size == 1:
        kind = "all_gather"
    return CORES[kind](cp)
