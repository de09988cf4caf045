"""The table of a run of the fault trials, or of its parts: `python -m tests.faults.table FILE...` prints it."""

import json
import sys
from pathlib import Path
from typing import Any

GROWTH = ("growth (MB/h)", "fewest handles, first third", "fewest handles, last third")


def table(*parts: dict[str, Any]) -> str:
    """One line for each test: goal, what was done, trials, seconds."""
    rows = sorted((row for found in parts for row in found["rows"]), key=lambda row: int(row["goal"][1:]))
    lines = ["| goal | what is done, and must hold | trials | seconds |", "|---|---|---:|---:|"]
    for row in rows:
        what = row["what"] + "".join(f"; {name}: {value:g}" for name, value in row["notes"].items())
        done = f"{row['done']:,}" if row["passed"] else f"**{row['done']:,} of {row['wanted']:,}: failed**"
        lines.append(f"| {row['goal']} | {what} | {done} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def soak_table(found: dict[str, Any]) -> str:
    """What a soak found, a line each."""
    struck = found["faults"]
    lines = ["| soak | |", "|---|---|"]
    lines.append(f"| {found['ranks']} ranks for {found['minutes']:g} minutes, seed {found['seed']} | {found['date']} |")
    kinds = ", ".join(f"{number} {kind}" for kind, number in struck.items())
    lines.append(f"| faults, one every {found['every (s)']:g} s | {sum(struck.values())}: {kinds} |")
    lines.append(f"| attempts, all started without a person | {found['attempts']} |")
    lines.append(f"| damaged checkpoints passed over | {found['damaged checkpoints passed over']} |")
    lines.append(f"| steps; done again | {found['steps']:,}; {found['steps done again']:,} |")
    median, longest = found["median from an end to the next step (s)"], found["longest (s)"]
    lines.append(f"| from an end to the next step: median; longest | {median} s; {longest} s |")
    for who in ("supervisor", "rank 0"):
        grown, first, last = (found[who][name] for name in GROWTH)
        lines.append(f"| {who}: growth of memory; handles at first, at last | {grown} MB/h; {first}, {last} |")
    verdict = "the same" if found["same as undisturbed"] else f"**failed: {'; '.join(found['problems'])}**"
    return "\n".join([*lines, f"| hash of every step, against the undisturbed run | {verdict} |"])


if __name__ == "__main__":
    told = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    print(soak_table(told[0]) if "soak" in told[0] else table(*told))
