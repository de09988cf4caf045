"""Pictures of a run, drawn from the JSON lines that it left: how the loss fell, and where the tokens went."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import DataError
from megatron_moe.config.optional import require

DOTS_PER_INCH = 120
MOST_SHARES = 4  # the darkest red of the load picture, in fair shares


def draw_loss_curve(metrics_jsonl: Path, png: Path, baselines: dict[str, float]) -> None:
    """Training and validation loss over the steps; baselines (nats per token, by name) as level lines.

    Raises DataError when the file is missing or holds no loss, ConfigError when matplotlib is missing.
    """
    _save(loss_figure(_read(metrics_jsonl, ("loss", "validation_loss")), baselines), png)


def draw_expert_load(routing_jsonl: Path, png: Path) -> None:
    """How many assignments each expert of each layer was asked for at each logged step, in shares of an even split.

    Raises DataError when the file is missing or holds no load, ConfigError when matplotlib is missing.
    """
    _save(load_figure(_read(routing_jsonl, ("requested",))), png)


def loss_figure(lines: list[dict[str, Any]], baselines: dict[str, float]) -> Any:
    """A matplotlib figure of lines with `step` and `loss` or `validation_loss`, in nats per token."""
    figure = _figure(width=8.0, height=5.0)
    plot = figure.subplots()
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if training:
        marker = "." if len(training) < 40 else ""
        label = f"training, last {training[-1][1]:.3f}"
        plot.plot(*zip(*training, strict=True), color="tab:blue", linewidth=1.3, marker=marker, label=label)
    if validation:
        label = f"validation, last {validation[-1][1]:.3f}"
        plot.plot(*zip(*validation, strict=True), color="tab:red", marker="o", markersize=5, linewidth=1.0, label=label)
    for number, (name, value) in enumerate(sorted(baselines.items(), key=lambda item: -item[1])):
        style = ("--", "-.", ":")[number % 3]
        plot.axhline(value, color="0.35", linestyle=style, linewidth=1.2, label=f"{name}, {value:.3f}")
    tokens = {line["tokens"] for line in lines if "tokens" in line}
    plot.set_title("Loss of the run")
    plot.set_xlabel(f"step ({tokens.pop():,} tokens each)" if len(tokens) == 1 else "step")
    plot.set_ylabel("cross-entropy (nats per token)")
    plot.grid(alpha=0.3)
    plot.legend(loc="upper right")
    return figure


def load_figure(lines: list[dict[str, Any]]) -> Any:
    """A matplotlib figure of lines with `step` and `requested`: {layer: assignments of each expert}."""
    shares = load_shares(lines)
    steps = [int(line["step"]) for line in lines]
    columns = 1 if len(shares) <= 3 else math.ceil(math.sqrt(len(shares)))
    rows = math.ceil(len(shares) / columns)
    figure = _figure(width=max(8.0, 4.0 * columns), height=1.2 + 2.2 * rows)
    plots = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    # white is fair; one expert that takes nearly all must not make the others pale
    worst = max(float(share.max()) for share in shares.values())
    highest = min(MOST_SHARES, max(2, math.ceil(worst)))
    norm = require("matplotlib.colors", extra="log").TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=highest)
    for plot, (layer, share) in zip(plots, shares.items(), strict=False):
        experts = np.arange(share.shape[0] + 1) - 0.5
        mesh = plot.pcolormesh(_edges(steps), experts, share, cmap="RdBu_r", norm=norm)
        plot.set_title(f"layer {layer}", fontsize=10)
        plot.set_ylabel("expert")
        if share.shape[0] <= 16:
            plot.set_yticks(range(share.shape[0]))
        plot.label_outer(remove_inner_ticks=False)
    for plot in plots[len(shares) :]:
        plot.set_visible(False)
    for plot in plots[max(0, len(shares) - columns) : len(shares)]:
        plot.tick_params(labelbottom=True)
        plot.set_xlabel("step")
    figure.suptitle("Load of every expert, before capacity")
    bar = figure.colorbar(
        mesh,
        ax=plots.tolist(),
        extend="max" if worst > highest else "neither",
        aspect=30,
        pad=0.02,
        ticks=[0, 0.5, *range(1, highest + 1)],
    )
    bar.set_label("load / fair share (1 = even split)")
    return figure


def load_shares(lines: list[dict[str, Any]]) -> dict[int, NDArray[np.float64]]:
    """For each layer, in order, (experts, logged steps): load over the mean of the step, 1 where it is 0."""
    layers = sorted({int(layer) for line in lines for layer in line["requested"]})
    shares = {}
    for layer in layers:
        load = np.array([line["requested"][str(layer)] for line in lines], dtype=np.float64).T
        mean = load.mean(axis=0)
        shares[layer] = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
    return shares


def _edges(steps: list[int]) -> list[float]:
    """Borders of the columns: half-way between logged steps."""
    middles = [(left + right) / 2 for left, right in pairwise(steps)]
    if not middles:
        return [steps[0] - 0.5, steps[0] + 0.5]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


def _read(path: Path, wanted: tuple[str, ...]) -> list[dict[str, Any]]:
    """Lines of a run, in step order, that have any of the wanted entries; a half-written line is left out."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; a run writes it into the folder that --log-dir names.") from None
    found = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the run was killed while it wrote, or is writing now
        if isinstance(values, dict) and "step" in values and any(values.get(name) is not None for name in wanted):
            found.append(values)
    if not found:
        raise DataError(f"{path} has no line with {' or '.join(wanted)}; let the run reach its first log line.")
    return sorted(found, key=lambda values: int(values["step"]))


def _figure(width: float, height: float) -> Any:
    """An empty figure on matplotlib's Agg canvas, without the global state of pyplot. Sizes in inches."""
    figure = require("matplotlib.figure", extra="log").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg", extra="log").FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, png: Path) -> None:
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png", dpi=DOTS_PER_INCH)
