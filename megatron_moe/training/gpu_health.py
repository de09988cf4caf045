"""Signs that a card is failing, told in the log when they appear and not at every step.

Uncorrected ECC errors, Xid errors of the driver, clocks held down, rows of memory that wait to be replaced. What a card
or a driver does not offer is passed over.
"""

import logging
from collections.abc import Callable
from typing import Any

from megatron_moe.training.xid import XID_LIMIT, XidEvents, explain_xid

logger = logging.getLogger(__name__)

# constant of NVML, what it means, whether the machine itself is at fault
_SLOWDOWNS = (
    ("nvmlClocksThrottleReasonHwSlowdown", "hardware slowdown (heat, or power outside its bounds)", True),
    ("nvmlClocksThrottleReasonHwThermalSlowdown", "hardware thermal slowdown: too hot; look at its cooling", True),
    ("nvmlClocksThrottleReasonHwPowerBrakeSlowdown", "power brake: the machine's power supply asks for less", True),
    ("nvmlClocksThrottleReasonSwThermalSlowdown", "software thermal slowdown: too hot; look at its cooling", True),
    ("nvmlClocksThrottleReasonSwPowerCap", "software power cap: at its power limit, usual under full load", False),
)
# a reason that comes and goes is told so often
_TOLD_AT_MOST = 3


class GpuHealth:
    """Compares a card with what it was at the start of the run."""

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self._nvml = nvml
        self._handle = handle
        self._name = name
        self._slow: set[str] = set()
        self._told: dict[str, int] = {}
        self._remapping = (0, 0)
        self._uncorrected = self._ecc("UNCORRECTED") or 0
        self._xids = XidEvents(nvml, handle)
        self._num_xids = 0

    def check(self) -> dict[str, float]:
        """Tell what is new; returns counts for the log line, of what has happened at all."""
        self._check_ecc()
        self._check_xids()
        self._check_clocks()
        self._check_rows()
        counts = {"gpu ECC corrected": self._ecc("CORRECTED"), "gpu Xid errors": self._num_xids}
        return {name: float(count) for name, count in counts.items() if count}

    def _ask(self, question: Callable[[], Any]) -> Any:
        """None where the card has no answer."""
        try:
            return question()
        except Exception:  # NVML's own errors share no base class with ours, and none may stop a run
            return None

    def _ecc(self, kind: str) -> int | None:
        nvml = self._nvml
        found: int | None = self._ask(
            lambda: nvml.nvmlDeviceGetTotalEccErrors(
                self._handle, getattr(nvml, f"NVML_MEMORY_ERROR_TYPE_{kind}"), nvml.NVML_VOLATILE_ECC
            )
        )
        return found

    def _check_ecc(self) -> None:
        count = self._ecc("UNCORRECTED")
        if count is not None and count > self._uncorrected:
            logger.warning(
                "%s: %d new uncorrected ECC errors, %d since the driver was loaded: what it computes may be wrong. "
                "Go on from the last checkpoint on another card, and have this one reset and tested.",
                *(self._name, count - self._uncorrected, count),
            )
        if count is not None:
            self._uncorrected = count

    def _check_xids(self) -> None:
        for number in self._xids.new():
            self._num_xids += 1
            if self._num_xids <= XID_LIMIT:
                logger.warning("%s: Xid %d: %s", self._name, number, explain_xid(number))

    def _check_clocks(self) -> None:
        reasons = self._ask(lambda: self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))
        if reasons is None:
            return
        for constant, meaning, is_fault in _SLOWDOWNS:
            slow = bool(int(reasons) & int(getattr(self._nvml, constant, 0)))
            if slow == (constant in self._slow):
                continue
            self._slow ^= {constant}
            self._tell_clocks(constant, meaning, logging.WARNING if is_fault and slow else logging.INFO, slow)

    def _tell_clocks(self, constant: str, meaning: str, level: int, slow: bool) -> None:
        told = self._told[constant] = self._told.get(constant, 0) + slow
        if told > _TOLD_AT_MOST:
            return
        last = "; it comes and goes and is not told again" if told == _TOLD_AT_MOST and slow else ""
        logger.log(level, "%s: clocks are %s: %s%s", self._name, "held down" if slow else "free again", meaning, last)

    def _check_rows(self) -> None:
        found = self._ask(lambda: self._nvml.nvmlDeviceGetRemappedRows(self._handle))
        if found is None:
            return
        _, _, pending, failed = (int(value) for value in found)
        if (pending, failed) == self._remapping:
            return
        if pending > self._remapping[0]:
            logger.warning("%s: rows of its memory wait to be replaced; reset it before its next job.", self._name)
        if failed > self._remapping[1]:
            logger.warning("%s: a row of its memory could not be replaced; take it out of use.", self._name)
        self._remapping = (pending, failed)
