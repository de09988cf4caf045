"""Prints every way of routing: paper, who chooses, losses, capacity, what it is good for; --check measures promises.

Examples:
    python tools/list_routers.py
    python tools/list_routers.py --check --json
    python tools/list_routers.py --router my_router.py:MyRouter --check
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_moe.config.errors import MegatronMoEError
from megatron_moe.inference.labels import measure_labels
from megatron_moe.report.router_list import RouterLine, example_config, router_line, router_lines

LABELS = ("decoder_safe", "batch_invariant", "generation_safe")


def measured(line: RouterLine) -> dict[str, bool]:
    """The three labels of a router, on small models."""
    return asdict(measure_labels(example_config(line.name)))


def broken_promises(line: RouterLine, labels: dict[str, bool]) -> list[str]:
    """Where what was measured is not what was declared."""
    pairs = {"decoder_safe": line.causal, "batch_invariant": line.batch_independent}
    return [
        f"{line.name} declares {name} {declared} and is measured {labels[name]}"
        for name, declared in pairs.items()
        if labels[name] is not declared
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table for a README."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_word(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _word(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """One block for each router: a dozen columns would not fit a screen."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        for name, value in row.items():
            style = "bold" if name == "name" else ""
            table.add_row(name.replace("_", " "), _word(value), style=style)
        table.add_row()
    Console(soft_wrap=True).print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0], epilog="\n".join(lines[2:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON list instead of text")
    form.add_argument("--markdown", action="store_true", help="a Markdown table instead of text")
    parser.add_argument(
        "--check", action="store_true", help="measure the labels; exit code 1 where a declaration is wrong"
    )
    parser.add_argument("--router", help="this one only: a name, or path/to/file.py:ClassName")
    parser.add_argument("--columns", help="these only, separated by commas: name,paper,...")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    try:
        lines = [router_line(options.router)] if options.router else router_lines()
        rows, broken = [], []
        for line in lines:
            labels = measured(line) if options.check else {}
            broken += broken_promises(line, labels) if options.check else []
            rows.append({**line.as_dict(), **labels})
    except MegatronMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.columns:
        wanted = options.columns.split(",")
        unknown = [name for name in wanted if name not in rows[0]]
        if unknown:
            print(f"error: --columns {unknown[0]}: expected some of {', '.join(rows[0])}", file=sys.stderr)
            return 2
        rows = [{name: row[name] for name in wanted} for row in rows]
    if options.json:
        print(json.dumps(rows, indent=1))
    elif options.markdown:
        print(markdown(rows))
    else:
        show(rows)
    for problem in broken:
        print(f"broken promise: {problem}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
