"""When, of what and on what machine figures were found."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.stream import code_version


def conditions() -> dict[str, Any]:
    """For the JSON files of results."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "megatron_moe": code_version()},
        "commit": _commit(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    told = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return told.stdout.strip() or None if told else None
