"""The table of a run of the fault trials: `python -m tests.faults.table FILE` prints it as Markdown."""

import json
import sys
from pathlib import Path
from typing import Any


def table(found: dict[str, Any]) -> str:
    """One line for each test: goal, what was done, trials, seconds."""
    lines = ["| goal | what is done, and must hold | trials | seconds |", "|---|---|---:|---:|"]
    for row in found["rows"]:
        what = row["what"] + "".join(f"; {name}: {value:g}" for name, value in row["notes"].items())
        done = f"{row['done']:,}" if row["passed"] else f"**{row['done']:,} of {row['wanted']:,}: failed**"
        lines.append(f"| {row['goal']} | {what} | {done} | {row['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
