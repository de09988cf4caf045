"""A timeline as text, a row a rank, and as a picture."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_moe.config.optional import require
from megatron_moe.pipeline.actions import Action, Entry, Kind, Pair, Pipeline
from megatron_moe.pipeline.schedule import Number
from megatron_moe.planning.simulate import Timeline, Turn

DOTS_PER_INCH = 120
MOST_LABELS = 64  # entries of a rank; with more, their numbers would not be legible in a picture
COLOURS = {
    "forward": "#4c9be8",
    "backward": "#f2a65a",
    "input half of backward": "#f2a65a",
    "weight half of backward": "#8cc084",
    "pair of forward and backward": "#b497d6",
}
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "input half of backward",
    Kind.BACKWARD_WEIGHT: "weight half of backward",
}


def draw_text(timeline: Timeline, shape: Pipeline, width: int) -> list[str]:
    """A line for each rank, and one that says how to read them; none is longer than `width` characters where it may.

    A time unit, the greatest that divides all times, takes as many columns as the number of a microbatch needs. Where
    that is too wide a column is several units long, and shows what fills most of it.
    """
    unit = _unit(timeline)
    names = [f"rank {rank:<{len(str(shape.ranks - 1))}}  " for rank in range(shape.ranks)]
    places = max(1, width - len(names[0]))
    units = int(Fraction(timeline.total) / unit)
    label = 1 + len(str(shape.microbatches - 1))
    if units * label <= places:
        rows = [_labelled(turns, unit, units, label, shape) for turns in timeline.ranks]
        scale = f"time {float(unit):g} = {label} columns"
    else:
        each = unit * math.ceil(units / places)
        rows = [_scaled(turns, each, math.ceil(Fraction(timeline.total) / each)) for turns in timeline.ranks]
        scale = f"time {float(each):g} = 1 column"
    return [*map("".join, zip(names, rows, strict=True)), _legend(timeline, shape, scale)]


def _unit(timeline: Timeline) -> Fraction:
    """The greatest time of which every start and end is a multiple."""
    times = {Fraction(time) for turns in timeline.ranks for turn in turns for time in (turn.start, turn.end)} - {0}
    together = math.lcm(*(time.denominator for time in times))
    return Fraction(math.gcd(*(int(time * together) for time in times)), together) if times else Fraction(1)


def _labelled(turns: list[Turn], unit: Fraction, units: int, label: int, shape: Pipeline) -> str:
    row = ["."] * (units * label)
    for turn in turns:
        start, end = (int(time / unit) * label for time in (Fraction(turn.start), Fraction(turn.end)))
        row[start:end] = _name(turn.entry, shape).ljust(end - start, "-")[: end - start]
    return "".join(row)


def _name(entry: Entry, shape: Pipeline) -> str:
    """F3, B3, I3, W3, in small letters in every second round; a pair is P, forward, backward."""
    if isinstance(entry, Pair):
        return f"P{entry.forward.microbatch}/{entry.backward.microbatch}"
    letter = entry.kind.value
    return f"{letter.lower() if entry.stage // shape.ranks % 2 else letter}{entry.microbatch}"


def _scaled(turns: list[Turn], each: Fraction, columns: int) -> str:
    """The letter of what fills most of each column; `each`: the time of a column."""
    shares: list[dict[str, Number]] = [{} for _ in range(columns)]
    for turn in turns:
        letter = "P" if isinstance(turn.entry, Pair) else turn.entry.kind.value
        for column in range(int(turn.start / each), min(columns, math.ceil(turn.end / each))):
            part = min(turn.end, (column + 1) * each) - max(turn.start, column * each)
            shares[column][letter] = shares[column].get(letter, 0) + part
    for share in shares:
        share["."] = each - sum(share.values())
    return "".join(max(share, key=lambda letter: share[letter]) for share in shares)


def _legend(timeline: Timeline, shape: Pipeline, scale: str) -> str:
    entries = [turn.entry for turns in timeline.ranks for turn in turns]
    kinds = {entry.kind for entry in entries if isinstance(entry, Action)}
    words = [f"{kind.value} {NAMES[kind]}" for kind in Kind if kind in kinds]
    words += ["P pair of forward/backward"] if any(isinstance(entry, Pair) for entry in entries) else []
    words += ["small letters: every second round"] if shape.rounds > 1 and "columns" in scale else []
    return f"{scale}; {', '.join(words)}, . idle"


def draw_picture(timeline: Timeline, shape: Pipeline, title: str, png: Path) -> None:
    """The timeline as a PNG: a bar a rank. Raises ConfigError when matplotlib is missing."""
    figure = timeline_figure(timeline, shape, title)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png", dpi=DOTS_PER_INCH)


def timeline_figure(timeline: Timeline, shape: Pipeline, title: str) -> Any:
    """A matplotlib figure on its Agg canvas, without the global state of pyplot; later rounds are darker."""
    figure = require("matplotlib.figure", extra="log").Figure(
        figsize=(12.0, 1.6 + 0.35 * shape.ranks), layout="constrained"
    )
    require("matplotlib.backends.backend_agg", extra="log").FigureCanvasAgg(figure)
    plot = figure.subplots()
    labelled = max(map(len, timeline.ranks)) <= MOST_LABELS
    for rank, turns in enumerate(timeline.ranks):
        for turn in turns:
            _bar(plot, turn, rank, shape)
            if labelled:
                text = "/".join(str(action.microbatch) for action in turn.entry.parts)
                plot.text(float(turn.start + turn.end) / 2, rank, text, ha="center", va="center", fontsize=7)
    plot.set_title(title)
    plot.set_xlabel("time")
    plot.set_ylabel("rank")
    plot.set_yticks(range(shape.ranks) if shape.ranks <= 16 else range(0, shape.ranks, shape.ranks // 8))
    plot.set_xlim(0, float(timeline.total))
    plot.set_ylim(shape.ranks - 0.5, -0.5)
    patch = require("matplotlib.patches", extra="log").Patch
    played = {_kind(turn.entry) for turns in timeline.ranks for turn in turns}
    keys = [patch(color=colour, label=name) for name, colour in COLOURS.items() if name in played]
    later = " (later rounds are darker)" if shape.rounds > 1 else ""
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), title=f"microbatches{later}")
    return figure


def _kind(entry: Entry) -> str:
    return "pair of forward and backward" if isinstance(entry, Pair) else NAMES[entry.kind]


def _bar(plot: Any, turn: Turn, rank: int, shape: Pipeline) -> None:
    shade = turn.entry.parts[0].stage // shape.ranks / shape.rounds
    light = require("matplotlib.colors", extra="log").to_rgb(COLOURS[_kind(turn.entry)])
    plot.barh(
        rank,
        float(turn.end - turn.start),
        left=float(turn.start),
        height=0.9,
        color=[part * (1 - 0.5 * shade) for part in light],
        edgecolor="white",
        linewidth=0.4,
    )
