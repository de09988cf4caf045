"""The pictures show the numbers of the files: read back from the figure, and from the pixels of the PNG."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_moe.config.errors import ConfigError, DataError
from megatron_moe.report.pictures import draw_expert_load, draw_loss_curve, load_figure, load_shares, loss_figure

LOSSES = [
    {"step": 1, "loss": 8.0, "tokens": 2048},
    {"step": 10, "loss": 5.0, "tokens": 2048},
    {"step": 10, "validation_loss": 5.5},
    {"step": 20, "loss": 4.0, "tokens": 2048},
]
LOADS = [
    {"step": 1, "requested": {"3": [2, 2, 2, 2], "1": [8, 0, 0, 0]}},
    {"step": 10, "requested": {"3": [1, 3, 2, 2], "1": [4, 2, 1, 1]}},
]


def write(path: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def test_the_loss_curve_holds_every_point_and_baseline() -> None:
    plot = loss_figure(LOSSES, {"unigram": 6.5, "bigram": 4.5}).axes[0]
    points = {line.get_label(): line.get_xydata().tolist() for line in plot.lines}
    assert points["training, last 4.000"] == [[1, 8], [10, 5], [20, 4]]
    assert points["validation, last 5.500"] == [[10, 5.5]]
    assert [y for _, y in points["unigram, 6.500"]] == [6.5, 6.5]
    assert [y for _, y in points["bigram, 4.500"]] == [4.5, 4.5]
    assert plot.get_xlabel() == "step (2,048 tokens each)"
    assert plot.get_ylabel() == "cross-entropy (nats per token)"
    assert len(plot.get_legend().get_texts()) == 4


def test_the_picture_of_a_run_that_goes_on_is_drawn(tmp_path: Path) -> None:
    lines = write(tmp_path / "metrics.jsonl", LOSSES, tail='{"step": 30, "lo')
    png = tmp_path / "pictures" / "loss.png"
    draw_loss_curve(lines, png, {})
    assert png.read_bytes().startswith(b"\x89PNG")
    image = imread(png)
    assert image.shape[:2] == (600, 960)
    # the blue of the training curve is there
    assert (np.abs(image[..., :3] - np.array([31, 119, 180]) / 255).max(axis=-1) < 0.02).sum() > 100


def test_load_is_relative_to_the_fair_share() -> None:
    shares = load_shares(LOADS)
    assert list(shares) == [1, 3]
    assert shares[1].tolist() == [[4, 2], [0, 1], [0, 0.5], [0, 0.5]]
    assert shares[3].tolist() == [[1, 0.5], [1, 1.5], [1, 1], [1, 1]]
    idle = load_shares([{"step": 1, "requested": {"0": [0, 0]}}])
    assert idle[0].tolist() == [[1], [1]]


def test_the_load_picture_has_a_panel_for_each_layer_in_order_and_one_scale() -> None:
    figure = load_figure(LOADS)
    panels, bar = figure.axes[:-1], figure.axes[-1]
    assert [panel.get_title() for panel in panels] == ["layer 1", "layer 3"]
    for panel, layer in zip(panels, (1, 3), strict=True):
        mesh = panel.collections[0]
        assert mesh.get_array().tolist() == load_shares(LOADS)[layer].tolist()
        assert mesh.norm(1.0) == 0.5 and mesh.norm(0.0) == 0.0  # fair is the middle of the colours, nothing their end
    assert panels[-1].get_xlabel() == "step"
    assert all(panel.get_ylabel() == "expert" for panel in panels)
    assert "fair share" in bar.get_ylabel()


@pytest.mark.parametrize("layers", [1, 4, 5, 9])
def test_panels_of_deep_models_fill_a_grid(layers: int) -> None:
    lines = [{"step": 5, "requested": {str(layer): [1, 2] for layer in range(layers)}}]
    panels = [panel for panel in load_figure(lines).axes[:-1] if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == [f"layer {layer}" for layer in range(layers)]


def test_pixels_show_the_overloaded_expert_red_and_the_idle_one_blue(tmp_path: Path) -> None:
    steps = [{"step": step, "requested": {"0": [9, 0]}} for step in (10, 20, 30)]
    draw_expert_load(write(tmp_path / "routing.jsonl", steps), tmp_path / "load.png")
    image = imread(tmp_path / "load.png")
    rows, columns = image.shape[:2]
    # expert 0 is the lower half of the one panel
    lower, upper = (image[int(rows * height), columns // 3, :3] for height in (0.65, 0.35))
    assert lower[0] > lower[2] + 0.2
    assert upper[2] > upper[0] + 0.2


def test_a_file_without_figures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", {})
    empty = write(tmp_path / "metrics.jsonl", [{"step": 1, "grad_norm": 2.0}], tail="[1]\n")
    with pytest.raises(DataError, match="no line with loss or validation_loss"):
        draw_loss_curve(empty, tmp_path / "loss.png", {})
    with pytest.raises(DataError, match="no line with requested"):
        draw_expert_load(empty, tmp_path / "load.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"megatron_moe\[log\]"):
        draw_loss_curve(write(tmp_path / "metrics.jsonl", LOSSES), tmp_path / "loss.png", {})
