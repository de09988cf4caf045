"""The ledger: one JSON line for each run, added to by any machine, never rewritten."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_moe.config.errors import DataError
from tools.benchmark.study.run import Arm, Size, code_version

Line = dict[str, Any]
KEY = ("arm", "table", "moe", "frozen", "size", "seed", "text", "code")


def key_of(arm: Arm, size: Size, seed: int, text: str) -> Line:
    """What a run is known by: two runs with one key are the same run."""
    named = asdict(arm)
    return {
        "arm": named["name"],
        "table": named["table"],
        "moe": dict(sorted(arm.moe.items())),
        "frozen": arm.frozen,
        "size": asdict(size),
        "seed": seed,
        "text": text,
        "code": code_version(),
    }


def same(line: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return all(line.get(name) == key[name] for name in KEY)


def read(path: Path) -> list[Line]:
    """All lines; DataError names the first that is broken."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            missing = [name for name in (*KEY, "loss") if name not in line]
        except (json.JSONDecodeError, TypeError) as error:
            raise DataError(
                f"{path}, line {number} is no JSON object ({error}); remove it and repeat the run."
            ) from None
        if missing:
            raise DataError(f"{path}, line {number} has no '{missing[0]}'; remove it and repeat the run.")
        lines.append(line)
    return lines


def add(path: Path, key: Line, found: Line) -> Line:
    """Append one run with where and when it was made; one write, so that several processes may share a ledger."""
    made = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} {platform.python_version()} torch {torch.__version__}",
    }
    line = {**key, **found, **made}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line
