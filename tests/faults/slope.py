"""Whether a process, or those that take each other's place, grow: memory and file handles over time (Linux)."""

import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Growth:
    """Measurements in order of time."""

    # arrays: what measures a slope must not grow itself
    seconds: "array[float]" = field(default_factory=lambda: array("d"))
    resident: "array[float]" = field(default_factory=lambda: array("d"))  # bytes that are no file's
    handles: "array[int]" = field(default_factory=lambda: array("l"))

    def add(self, now: float, process: int) -> None:
        """One measurement; none of a process that is gone."""
        try:
            resident, shared = map(int, Path(f"/proc/{process}/statm").read_text().split()[1:3])
            handles = len(os.listdir(f"/proc/{process}/fd"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return
        if resident == 0:
            return  # it has ended, nobody has noticed yet
        self.seconds.append(now)
        # pages of files, such as a library's, come and go with what else the machine does
        self.resident.append((resident - shared) * PAGE)
        self.handles.append(handles)

    @property
    def megabytes_per_hour(self) -> float | None:
        """Slope of the least squares; None of too few. The first tenth, while caches fill, is left out."""
        start = len(self.seconds) // 10
        if len(self.seconds) - start < 10:
            return None
        slope = np.polyfit(self.seconds[start:], self.resident[start:], 1)[0]
        return float(slope) * 3600 / 1e6

    @property
    def handles_grew(self) -> bool:
        """The fewest of the last third are more than the fewest of the first."""
        third = max(1, len(self.handles) // 3)
        return bool(self.handles) and min(self.handles[-third:]) > min(self.handles[:third])

    def said(self) -> dict[str, float | None]:
        slope = self.megabytes_per_hour
        return {
            "measurements": len(self.seconds),
            "memory (MB)": round(max(self.resident, default=0) / 1e6, 1),
            "growth (MB/h)": None if slope is None else round(slope, 2),
            "fewest handles, first third": min(self.handles[: max(1, len(self.handles) // 3)], default=0),
            "fewest handles, last third": min(self.handles[-max(1, len(self.handles) // 3) :], default=0),
        }
