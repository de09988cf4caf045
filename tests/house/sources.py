"""The files that the house rules read, and what a rule answers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# what people run, as opposed to what tests it
PRODUCT = ("megatron_moe", "tools", "examples", "docker", "setup.py")
EVERYTHING = (*PRODUCT, "tests")


@dataclass(frozen=True)
class Finding:
    """A broken rule at a line."""

    line: int
    text: str


Rule = Callable[[str], list[Finding]]


def files(suffixes: tuple[str, ...], places: tuple[str, ...] = EVERYTHING) -> Iterator[Path]:
    """Every file with one of the suffixes, in a fixed order; caches and hidden folders are left out."""
    for place in places:
        start = ROOT / place
        for path in [start] if start.is_file() else sorted(start.rglob("*")):
            hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)
            if path.suffix in suffixes and path.is_file() and not hidden:
                yield path


def broken(rule: Rule, paths: Iterator[Path]) -> list[str]:
    """`file:line: text` of each finding, ready to be compared with an empty list."""
    return [
        f"{path.relative_to(ROOT)}:{finding.line}: {finding.text}"
        for path in paths
        for finding in rule(path.read_text(encoding="utf-8"))
    ]
