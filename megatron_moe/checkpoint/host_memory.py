"""The memory that snapshots go into: got from the system once, then used by one save after another."""

import numpy as np
import torch
from torch import Tensor

from megatron_moe.checkpoint.storage import PAGE_BYTES


class HostMemory:
    """One stretch of memory, as large as the largest snapshot so far; its owner uses it for one snapshot at a time.

    Memory that is new costs several times a copy, for the system clears it page by page as it is first touched. So what
    is held between two saves is one snapshot: the bytes of this rank's blocks, those of replicas included (pinned, CUDA
    may round it up to the next power of two).
    """

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8)

    def room(self, num_bytes: int, pinned: bool) -> Tensor:
        """(num_bytes,) uint8, from a multiple of PAGE_BYTES on, with whatever was in it before.

        pinned: a GPU copies there at its full speed.
        Raises MemoryError or RuntimeError (torch's) without memory.
        """
        if len(self._held) < num_bytes or self._held.is_pinned() < pinned:
            # freed first: never two
            self.release()
            if pinned:
                self._held = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            else:
                # numpy asks for huge pages where the system has them, which torch does not
                held = np.empty(num_bytes + PAGE_BYTES, dtype=np.uint8)
                start = -held.ctypes.data % PAGE_BYTES
                self._held = torch.from_numpy(held[start : start + num_bytes])
        return self._held[:num_bytes]

    def release(self) -> None:
        """Give it back to the system."""
        self._held = torch.empty(0, dtype=torch.uint8)
