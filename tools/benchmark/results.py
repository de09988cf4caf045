"""What a benchmark run found: each part writes its own file as it goes; at the end they become one, and a table."""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from megatron_moe.config.whole_file import write_whole
from tools.benchmark.timing import Timing

FORMAT = 1
LIBRARIES = ("numpy", "transformers", "triton", "safetensors", "xxhash", "rich", "sentencepiece", "pytest")


@dataclass
class Recorder:
    """Figures, checks and omissions of one part; saved after each, so that a part that is stopped loses nothing."""

    part: str
    folder: Path
    device: torch.device
    quick: bool
    deadline: float  # of time.monotonic
    figures: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def figure(self, name: str, value: float, unit: str, shape: Mapping[str, Any], **more: Any) -> None:
        """One number. more: method, iterations, and whatever explains it."""
        entry = {"part": self.part, "name": name, "value": value, "unit": unit, "shape": dict(shape), **more}
        self.figures.append(entry)
        if more.get("headline"):
            print(f"  {_words(shape)}  {name}: {value:.4g} {unit}", flush=True)
        self._save()

    def timed(self, name: str, timing: Timing, shape: Mapping[str, Any], **more: Any) -> None:
        """A duration in milliseconds, with how it was taken."""
        self.figure(name, timing.median * 1e3, "ms", shape, **_how(timing, 1e3), **more)

    def check(self, name: str, error: float, tolerance: float, why: str) -> None:
        """An error that must not exceed its tolerance; NaN never passes."""
        passed = error <= tolerance
        number = error if math.isfinite(error) else None  # JSON has no NaN
        entry = {"part": self.part, "name": name, "passed": passed, "error": number, "tolerance": tolerance, "why": why}
        self.checks.append(entry)
        print(f"  {'pass' if passed else 'FAIL'}  {name}: {error:.3g} (allowed {tolerance:.3g})", flush=True)
        self._save()

    def broke(self, name: str, error: Exception) -> None:
        """A check that ended in an exception has failed."""
        self.check(name, math.nan, 0.0, f"{type(error).__name__}: {str(error)[:500]}")
        traceback.print_exception(error)

    def skip(self, what: str, why: str) -> None:
        """Says what was left out."""
        self.skipped.append({"part": self.part, "what": what, "why": why})
        print(f"  skipped  {what}: {why}", flush=True)
        self._save()

    def _save(self) -> None:
        found = {"machine": machine(self.device), "quick": self.quick}
        found |= {"figures": self.figures, "checks": self.checks, "skipped": self.skipped}
        # a part that is killed while it writes leaves the file before
        write_whole(self.folder / f"{self.part}.json", json.dumps(found))


def _how(timing: Timing, scale: float) -> dict[str, Any]:
    return {
        "lowest": timing.lowest * scale,
        "highest": timing.highest * scale,
        "iterations": timing.iterations,
        "method": timing.method,
    }


def _words(shape: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items())


def recorder(part: str, argv: Sequence[str] | None, about: str | None) -> Recorder:
    """The flags that all parts share, parsed, and where their findings go."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where the part writes its findings")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds", type=float, default=120.0, help="no new measurement starts after that time")
    given = parser.parse_args(argv)
    kind = given.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    given.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + given.seconds
    print(f"{part}:", flush=True)
    return Recorder(part, given.folder, torch.device(kind), given.quick, deadline)


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _answer(*command: str) -> str | None:
    """The first line of a command's output, None when it cannot be run."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(found.stdout.splitlines()), None)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", path.read_text()) if path.is_file() else []
    return names[0] if names else platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    found: dict[str, Any] = {"kind": device.type, "cpu": _cpu_name(), "cores": os.cpu_count()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "memory_bytes": card.total_memory, "cuda": torch.version.cuda}
        found["capability"] = list(torch.cuda.get_device_capability(0))
    else:
        found |= {"device": f"CPU {found['cpu']}", "threads": torch.get_num_threads()}
    found |= {"torch": torch.__version__, "python": platform.python_version()}
    found["load_average"] = round(os.getloadavg()[0], 2)
    found["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def surroundings(root: Path) -> dict[str, Any]:
    """What is asked once: the driver, the state of the source, the libraries."""
    changed = _answer("git", "-C", str(root), "status", "--porcelain")
    return {
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _answer("git", "-C", str(root), "rev-parse", "HEAD"),
        "changed_since_commit": bool(changed),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _tests(path: Path) -> dict[str, Any]:
    """Counts and failures out of pytest's JUnit file."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))

    def having(*tags: str) -> list[str]:
        return [f"{case.get('classname')}.{case.get('name')}" for case in cases if any(map(case.findall, tags))]

    failed, skipped = having("failure", "error"), having("skipped")
    return {"passed": len(cases) - len(failed) - len(skipped), "failed": failed, "skipped": skipped}


def collect(folder: Path, label: str) -> dict[str, Any]:
    """All that the parts left in a folder, as one object."""
    found: dict[str, Any] = {"format": FORMAT, "date": datetime.now(UTC).isoformat(timespec="seconds"), "label": label}
    figures: list[Any] = []
    checks: list[Any] = []
    skipped: list[Any] = []
    parts: dict[str, Any] = {}
    ledger = folder / "parts.txt"  # name, exit code, seconds: written by gpu_check.sh
    for line in ledger.read_text().splitlines() if ledger.is_file() else []:
        name, code, seconds = line.split()
        parts[name] = {"exit_code": int(code), "seconds": int(seconds)}
    machines: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        part = json.loads(path.read_text())
        machines[path.stem] = part["machine"]
        figures, checks, skipped = figures + part["figures"], checks + part["checks"], skipped + part["skipped"]
        found["quick"] = part["quick"]
    peaks = {name: entry.pop("peak_resident_bytes") for name, entry in machines.items()}
    for name, peak in peaks.items():
        parts.setdefault(name, {})["peak_resident_bytes"] = peak
    found["machine"] = next(iter(machines.values()), {}) | surroundings(Path(__file__).resolve().parents[2])
    tests = folder / "tests.xml"
    found["tests"] = _tests(tests) if tests.is_file() else None
    return found | {"parts": parts, "figures": figures, "checks": checks, "skipped": skipped}


def healthy(found: Mapping[str, Any]) -> bool:
    """Every part ran to its end, every check and every test passed."""
    ended = all(part.get("exit_code", 0) == 0 for part in found["parts"].values())
    tests = found["tests"]
    return ended and all(check["passed"] for check in found["checks"]) and not (tests and tests["failed"])


def table(found: Mapping[str, Any]) -> str:
    """The figures that people ask for, and what went wrong."""
    lines = [f"{found['machine'].get('device')}, torch {found['machine'].get('torch')}, {found['date']}"]
    lines += [
        f"{_words(entry['shape']):58} {entry['name']:38} {entry['value']:>10.4g} {entry['unit']}"
        for entry in found["figures"]
        if entry.get("headline")
    ]
    failed = [check["name"] for check in found["checks"] if not check["passed"]]
    lines.append(f"checks: {len(found['checks']) - len(failed)} passed, {len(failed)} failed {failed or ''}")
    if found["tests"]:
        tests = found["tests"]
        counts = f"{tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} skipped"
        lines.append(f"tests marked gpu: {counts} {tests['failed'] or ''}")
    codes = {name: part.get("exit_code", 0) for name, part in found["parts"].items()}
    lines += [f"part {name}: exit code {code}" for name, code in codes.items() if code]
    lines += [f"skipped: {entry['what']}: {entry['why']}" for entry in found["skipped"]]
    return "\n".join(lines)


def save(found: Mapping[str, Any], output: Path) -> Path:
    """Writes <date>-<device>.json; a second run of the day gets a number, so that no measurement is lost."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(found["machine"].get("device", "nothing")).lower()).strip("-")
    stem = f"{found['date'][:10]}-{slug}{'-quick' if found.get('quick') else ''}"
    output.mkdir(parents=True, exist_ok=True)
    path, number = output / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = output / f"{stem}-{number}.json"
    write_whole(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Joins the parts; exit code 1 when something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where the parts wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the result goes")
    parser.add_argument("--label", default="", help="what a reader must know of the conditions")
    given = parser.parse_args(argv)
    found = collect(given.folder, given.label)
    print(table(found))
    print(f"written: {save(found, given.output)}")
    return 0 if healthy(found) else 1


if __name__ == "__main__":
    sys.exit(main())
