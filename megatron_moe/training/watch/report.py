"""What a person reads about a hang."""

from collections.abc import Sequence

from megatron_moe.training.watch.processes import STATES
from megatron_moe.training.watch.verdict import Seen


def summary(guilty: Sequence[Seen], why: str) -> str:
    """One line: who, and why it is thought so."""
    names = ", ".join(seen.name for seen in guilty[:4])
    more = f" and {len(guilty) - 4} more" if len(guilty) > 4 else ""
    slowest = max(guilty, key=lambda seen: seen.stalled_s)
    verb = "hangs" if len(guilty) == 1 else "hang"
    return f"{names}{more} {verb}: no progress for {slowest.stalled_s:.1f} s, {slowest.beat.where}; {why}"


def report(ranks: Sequence[Seen], guilty: Sequence[Seen], why: str) -> str:
    """All ranks, the guilty ones first: where each is, and the Python stacks of its threads."""
    names = {seen.rank for seen in guilty}
    parts = [f"megatron_moe: {summary(guilty, why)}. All ranks end with exit code 87."]
    for seen in sorted(ranks, key=lambda seen: (seen.rank not in names, seen.rank)):
        parts.append(_paragraph(seen, "  <- hangs" if seen.rank in names else ""))
    return "\n".join(parts) + "\n"


def _paragraph(seen: Seen, mark: str) -> str:
    if seen.left:
        return f"--- {seen.name} has ended{mark}"
    state = STATES.get(seen.state)
    lines = [f"--- {seen.name} {seen.beat.where}, no progress for {seen.stalled_s:.1f} s{mark}"]
    if state is not None:
        lines.append(f"    its process was {state}")
    stack = seen.stack.strip() or "(no stack: nothing came back)"
    return "\n".join([*lines, *(f"    {line}" for line in stack.splitlines())])
