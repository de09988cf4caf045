"""Xid errors: what the NVIDIA driver reports of a card, by number."""

import logging
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

_RESTART = "the run can go on from its last checkpoint"
_REPLACE = "take the card out of use and have it tested"
# after NVIDIA's list of Xid errors
_MEANINGS = {
    13: f"a kernel failed (graphics engine exception, often an address out of bounds); {_RESTART}, a repeat is a bug",
    31: f"a kernel touched memory that is not its own (MMU fault); {_RESTART}, a repeat is a bug",
    43: f"a program's work was stopped after its own fault; {_RESTART}",
    45: "work was removed after an earlier error, or the program was ended; look for the error before it",
    48: "an uncorrectable error in memory (double-bit ECC); reset the card and go on from the last checkpoint",
    63: "a row or page of memory is marked to be replaced; reset the card before its next job",
    64: f"a row or page of memory could not be marked to be replaced; {_REPLACE}",
    74: "an error on NVLink; look at the other end of the link too, reset both, and check them if it repeats",
    79: "the card has fallen off the bus; the machine must be restarted, and checked if it repeats",
    92: f"many single-bit errors in memory were corrected; {_REPLACE} if it repeats",
    94: "an uncorrectable error in memory, contained: only this program is hit; restart it, reset the card soon",
    95: "an uncorrectable error in memory, not contained: all programs are hit; reset the card",
    119: "the card's system processor (GSP) does not answer; reset the card or restart the machine",
}
# told and read at a time: a card in distress can report thousands
XID_LIMIT = 50


def explain_xid(number: int) -> str:
    """In a few words, with what to do."""
    return _MEANINGS.get(number, "see NVIDIA's list of Xid errors, and the kernel's log (dmesg) of this machine")


class XidEvents:
    """The Xid errors of one card since this was made; none where the driver does not tell them."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._events: Any = None
        try:
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            self._events = events
        except Exception as error:  # NVML's own errors share no base class with ours, and none may stop a run
            logger.info("Xid errors are not in the log: NVML says %s", error)

    def new(self) -> Iterator[int]:
        """The numbers that have come since the last call; never waits."""
        for _ in range(XID_LIMIT if self._events is not None else 0):
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except Exception as error:
                if not _is_timeout(self._nvml, error):
                    logger.warning("Xid errors are no more in the log: NVML says %s", error)
                    self._events = None
                return
            if event.eventType == self._nvml.nvmlEventTypeXidCriticalError:
                yield int(event.eventData)


def _is_timeout(nvml: Any, error: Exception) -> bool:
    """NVML's way to say that there is nothing."""
    return getattr(error, "value", None) == getattr(nvml, "NVML_ERROR_TIMEOUT", 10)
