"""What the ledger shows: one table for each question, as Markdown, and one picture."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.config.optional import require
from tools.benchmark.study.claims import Difference, paired, verdict
from tools.benchmark.study.ledger import Line

BySeed = dict[int, Line]


def newest(lines: Iterable[Line], size: str) -> dict[str, BySeed]:
    """Lines of one size by arm and seed; of several runs with another code version, the last in the ledger."""
    found: dict[str, BySeed] = defaultdict(dict)
    for line in lines:
        if line["size"]["name"] == size:
            found[line["arm"]][line["seed"]] = line
    return dict(found)


def values(runs: BySeed, name: str) -> dict[int, float]:
    return {seed: float(line[name]) for seed, line in runs.items() if line[name] is not None}


def mean(runs: BySeed, name: str) -> float | None:
    found = values(runs, name)
    return statistics.fmean(found.values()) if found else None


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def dense_gap(arms: Mapping[str, BySeed]) -> float | None:
    """Nats by which the better of Switch and top-2 beats the dense model: what differences are measured against."""
    if "dense" not in arms:
        return None
    gaps = [
        found.mean
        for name in ("switch", "top_k")
        if name in arms and (found := paired(values(arms[name], "loss"), values(arms["dense"], "loss")))
    ]
    return -min(gaps) if gaps else None


def main_table(arms: Mapping[str, BySeed], names: Sequence[str]) -> str:
    """Each method beside the dense model and beside itself with a frozen router."""
    smallest = 0.1 * abs(dense_gap(arms) or 0.1)
    rows = []
    for name in names:
        if name not in arms or name.endswith("frozen router"):
            continue
        runs = arms[name]
        against = paired(values(runs, "loss"), values(arms.get("dense", {}), "loss")) if name != "dense" else None
        frozen = arms.get(f"{name}, frozen router")
        learned = paired(values(runs, "loss"), values(frozen, "loss")) if frozen else None
        rows.append(
            [
                name,
                str(len(runs)),
                _number(mean(runs, "loss")),
                "-" if against is None else f"{against}, {verdict(against, smallest=smallest)}",
                "-" if learned is None else f"{learned}, {verdict(learned, smallest=smallest)}",
                _below_bigram(runs),
                _number(mean(runs, "max_violation"), ".2f"),
                _number(mean(runs, "drop_rate"), ".3f"),
                _number(mean(runs, "rows_per_token"), ".2f"),
                _number(_thousandths(mean(runs, "seconds_per_step")), ".0f"),
                _number(_millions(mean(runs, "flops_per_token")), ".2f"),
                _number(_millions(mean(runs, "parameters")), ".2f"),
            ]
        )
    head = (
        *("router", "seeds", "loss", "less than dense", "less than its frozen router", "below the bigram at step"),
        *("MaxVio", "dropped", "rows / token", "ms / step", "MFLOP / token", "M parameters"),
    )
    return markdown(head, rows)


def _below_bigram(runs: BySeed) -> str:
    """The first evaluation at which each seed's loss was below the bigram model's, the latest of the seeds."""
    steps = [next((step for step, loss in line["curve"] if loss < line["bigram"]), None) for line in runs.values()]
    return "not yet" if None in steps else str(max(step for step in steps if step is not None))


def _thousandths(value: float | None) -> float | None:
    return None if value is None else 1e3 * value


def _millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def grid_table(arms: Mapping[str, BySeed], corner: str, rows: Sequence[str], columns: Sequence[str], form: str) -> str:
    """Losses of arms named by row and column, each beside the first column of its row."""
    lines = []
    for row in rows:
        cells = []
        first = arms.get(form.format(row=row, column=columns[0]), {})
        for column in columns:
            runs = arms.get(form.format(row=row, column=column), {})
            gap = paired(values(runs, "loss"), values(first, "loss")) if column != columns[0] else None
            cells.append(_number(mean(runs, "loss")) + ("" if gap is None else f" ({gap})"))
        lines.append([row, *cells])
    return markdown([corner, *columns], lines)


def memory_table(arms: Mapping[str, BySeed], names: Sequence[str]) -> str:
    """Loss on text like the training text and unlike it."""
    rows = [
        [
            name,
            str(len(arms[name])),
            _number(mean(arms[name], "loss")),
            _number(mean(arms[name], "unlike")),
            _number(mean(arms[name], "max_violation"), ".2f"),
            _number(_millions(mean(arms[name], "flops_per_token")), ".2f"),
            _number(_thousandths(mean(arms[name], "seconds_per_step")), ".0f"),
        ]
        for name in names
        if name in arms
    ]
    head = ("blocks, selection", "seeds", "loss", "loss on prose", "MaxVio", "MFLOP / token", "ms / step")
    return markdown(head, rows)


def claim(text: str, found: Difference | None, smallest: float) -> str:
    """One sentence, its difference and what may be said of it."""
    return f"- {text}: {'-' if found is None else found} nats per byte, **{verdict(found, smallest=smallest)}**"


def claims(arms: Mapping[str, BySeed]) -> str:
    """The papers' claims; a negative difference speaks for each."""
    smallest = 0.1 * abs(dense_gap(arms) or 0.1)

    def versus(mine: str, other: str, name: str = "loss") -> Difference | None:
        return paired(values(arms.get(mine, {}), name), values(arms.get(other, {}), name))

    said = [
        ("top-2 beats the dense model of the same active FLOPs", "top_k", "dense", "loss"),
        ("Switch beats the dense model of the same active FLOPs", "switch", "dense", "loss"),
        ("SAM, E=64: 8 experts activated beat 1", "E=64 k=8", "E=64 k=1", "loss"),
        ("SAM, E=8: 8 experts activated beat 1", "E=8 k=8", "E=8 k=1", "loss"),
        ("THOR's two passes beat one", "thor, two passes", "thor", "loss"),
        ("learned (Switch) beats random (THOR) routing", "switch", "thor", "loss"),
        ("Avg-K beats the learned gate at the smallest blocks", *_smallest_blocks(arms), "loss"),
        ("the same on prose", *_smallest_blocks(arms), "unlike"),
    ]
    lines = [claim(text, versus(mine, other, name), smallest) for text, mine, other, name in said]
    for experts in (8, 16, 32, 64):
        found = versus(f"E={experts} k=4", f"E={experts} k=1")
        lines.append(claim(f"SAM, E={experts}: 4 experts activated beat 1", found, smallest))
    sparser = _difference_of_gains(arms, "E=64", "E=8")
    lines.append(claim("SAM: 4 experts activated gain more over 1 at E=64 than at E=8", sparser, smallest))
    return "\n".join(lines) + "\n"


def _difference_of_gains(arms: Mapping[str, BySeed], first: str, second: str) -> Difference | None:
    """What k=4 changes over k=1 with `first` experts, less the same with `second`, seed by seed."""
    gains = []
    for experts in (first, second):
        many, one = (values(arms.get(f"{experts} k={k}", {}), "loss") for k in (4, 1))
        gains.append({seed: many[seed] - one[seed] for seed in many if seed in one})
    return paired(*gains)


def _smallest_blocks(arms: Mapping[str, BySeed]) -> tuple[str, str]:
    sizes = [int(name.split()[0].removeprefix("g=")) for name in arms if name.endswith("avg_k")]
    block = min(sizes, default=0)
    return f"g={block} avg_k", f"g={block} learned gate"


def picture(arms: Mapping[str, BySeed], path: Path) -> None:
    """Loss against training step, one line for each method, the mean of its seeds."""
    pyplot: Any = require("matplotlib.pyplot", extra="log")
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for name, runs in arms.items():
        if name.endswith("frozen router") or name.startswith(("E=", "g=")):
            continue
        curves = [line["curve"] for line in runs.values()]
        steps = [step for step, _ in curves[0]]
        losses = [statistics.fmean(curve[place][1] for curve in curves) for place in range(len(steps))]
        axes.plot(steps, losses, label=name, linewidth=2.5 if name == "dense" else 1.2)
    bigram = next(iter(next(iter(arms.values())).values()))["bigram"]
    axes.axhline(bigram, color="black", linestyle=":", label="bigram model")
    axes.set(xlabel="step", ylabel="validation loss, nats per byte")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
