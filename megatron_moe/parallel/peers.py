"""Telling the death of another rank from a mistake of this one."""

import re

from torch.distributed import DistError

from megatron_moe.config.errors import PeerError

# gloo throws a bare RuntimeError; its source file, in front of what happened, tells that it is gloo's
_GLOO = re.compile(r"^\[[^\]]*gloo/[^\]]*\]\s*")


def as_peer_error(error: RuntimeError, rank: int) -> PeerError | None:
    """The one line for a collective that failed or a peer that is gone; None if the error is something else."""
    text = str(error).strip()
    if not (isinstance(error, DistError) or _GLOO.match(text)):
        return None
    reason = _GLOO.sub("", text).partition("\n")[0].partition(". ")[0]
    return PeerError(f"rank {rank} lost another rank: {reason}. The first error of the other ranks tells the cause.")
