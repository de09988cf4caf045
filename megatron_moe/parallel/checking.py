"""The process groups that checked communicators talk over, beside those that they check."""

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_moe.parallel.checked import Board, Channels, Checked
from megatron_moe.parallel.communicator import Communicator, Torch

Channel = tuple[str, tuple[int, ...]]  # what for, and between which ranks of the world


@dataclass
class Checking:
    """Two groups for each channel, of gloo whatever the backend, for calls are compared on the host."""

    board: Board
    timeout: timedelta
    groups: dict[Channel, tuple[dist.ProcessGroup, dist.ProcessGroup]] = field(default_factory=dict)

    @classmethod
    def begin(cls, rank: int, timeout: timedelta) -> "Checking":
        """Collective over the world, as every rank must have as many boards as the others."""
        store = _get_default_store()
        number = store.add(f"checked collectives of rank {rank}", 1)
        return cls(Board(store, rank, f"checked collectives {number}"), timeout)

    def open(self, channel: Channel) -> None:
        """Make the groups of a channel, if they are not there. Collective over the world."""
        if channel not in self.groups:
            ranks = list(channel[1])
            one, other = (dist.new_group(ranks, timeout=self.timeout, backend="gloo") for _ in range(2))
            self.groups[channel] = (one, other)

    def around(self, inner: Communicator, channel: Channel, axis: str, place: int) -> Checked:
        """The communicator, checked. place: this rank's among those of the channel."""
        _, ranks = channel
        calls, answers = (Torch(group, ranks, place) for group in self.groups[channel])
        return Checked(inner, Channels(calls, answers, self.board, self.timeout), axis, ranks, place)
