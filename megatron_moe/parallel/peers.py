"""Telling the death of another rank from a mistake of this one."""

import re
from collections.abc import Callable

from torch.distributed import DistError

from megatron_moe.config.errors import PeerError

# gloo throws a bare RuntimeError; its source file, in front of what happened, tells that it is gloo's
_GLOO = re.compile(r"^\[[^\]]*gloo/[^\]]*\]\s*")


def nobody_knows() -> str | None:
    """No watcher."""
    return None


def as_peer_error(
    error: RuntimeError, rank: int, cause: Callable[[], str | None] = nobody_knows
) -> PeerError | None:
    """The one line for a collective that failed or a peer that is gone; None if the error is something else.

    cause: asks who died, which may take a moment.
    """
    text = str(error).strip()
    if not (isinstance(error, DistError) or _GLOO.match(text)):
        return None
    reason = _GLOO.sub("", text).partition("\n")[0].partition(". ")[0]
    who = cause()
    if who is not None:
        return PeerError(f"rank {rank} lost another rank: {who}. It showed as: {reason}.")
    return PeerError(f"rank {rank} lost another rank: {reason}. The first error of the other ranks tells the cause.")
