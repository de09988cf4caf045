"""The drawing shows the timeline: every entry where it was played, and dots where a rank waits."""

from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from megatron_moe.pipeline import interleaved, overlap, zero_bubble
from megatron_moe.pipeline.actions import Pipeline
from megatron_moe.pipeline.schedule import Costs
from megatron_moe.pipeline.schedules import SCHEDULES
from megatron_moe.planning.drawing import COLOURS, draw_picture, draw_text, timeline_figure
from megatron_moe.planning.simulate import Timeline, simulate


def played(name: str, shape: Pipeline, costs: Costs) -> Timeline:
    return simulate(SCHEDULES[name](shape), shape, costs)


def drawn(name: str, shape: Pipeline, costs: Costs, width: int = 120) -> list[str]:
    return draw_text(played(name, shape, costs), shape, width)


def test_two_ranks_by_hand() -> None:
    assert drawn("1f1b", Pipeline(2, 2), Costs(1, 1, 1)) == [
        "rank 0  F0F1....B0--..B1--",
        "rank 1  ..F0B0--F1B1--....",
        "time 1 = 2 columns; F forward, B backward, . idle",
    ]


def test_halves_rounds_and_pairs_are_told_apart() -> None:
    assert drawn("zb_h1", Pipeline(2, 2), Costs(1, 1, 1))[1] == "rank 1  ..F0I0F1I1W0W1"
    rounds = drawn("interleaved", Pipeline(2, 2, rounds=2), Costs(1, 1, 0))
    assert rounds[0] == "rank 0  F0F1f0f1..b0..b1B0B1"
    assert rounds[2] == "time 1 = 2 columns; F forward, B backward, small letters: every second round, . idle"
    pairs = drawn("1f1b_overlap", Pipeline(1, 3), Costs(1, 1, 1))
    assert pairs == [
        "rank 0  F0P1/0P2/1B2--",
        "time 1 = 2 columns; F forward, B backward, P pair of forward/backward, . idle",
    ]


def test_a_time_unit_divides_all_times() -> None:
    lines = drawn("1f1b", Pipeline(1, 2), Costs(Fraction(3, 2), 1, 1))
    assert lines == ["rank 0  F0----B0------F1----B1------", "time 0.5 = 2 columns; F forward, B backward, . idle"]


def test_numbers_of_two_digits_have_room() -> None:
    rows = drawn("1f1b", Pipeline(2, 11), Costs(1, 1, 1))
    assert rows[1].startswith("rank 1  ...F0-B0----F1-B1----") and "F10B10---" in rows[1]


@pytest.mark.parametrize(
    ("name", "module", "shape", "costs"),
    [
        ("interleaved", interleaved, Pipeline(2, 4, 2), Costs(1, 1, 0)),
        ("zb_h1", zero_bubble, Pipeline(3, 4), Costs(1, 1, 1)),
        ("1f1b_overlap", overlap, Pipeline(2, 4), Costs(1, 1, 1)),
    ],
)
def test_schedules_are_as_their_files_draw_them(
    name: str, module: ModuleType, shape: Pipeline, costs: Costs
) -> None:
    lines = (line.strip() for line in (module.__doc__ or "").splitlines())
    assert [line for line in lines if line.startswith("rank ")] == drawn(name, shape, costs)[:-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_too_wide_is_scaled(name: str) -> None:
    shape = Pipeline(12, 300)
    *rows, legend = drawn(name, shape, Costs(2, 3, 1), width=70)
    assert len({len(row) for row in rows}) == 1 and 40 < len(rows[0]) <= 70
    assert [row[:9] for row in rows] == [f"rank {rank:<2}  " for rank in range(12)]
    assert "= 1 column; " in legend
    assert set("".join(row[9:] for row in rows)) <= set("FBIWP.")


def test_a_scaled_column_shows_what_fills_most_of_it() -> None:
    timeline = played("sequential", Pipeline(1, 4), Costs(1, 2, 1))  # F BBB F BBB F BBB F BBB
    assert draw_text(timeline, Pipeline(1, 4), 8 + 8) == [
        "rank 0  FBFBFBFB",
        "time 2 = 1 column; F forward, B backward, . idle",
    ]
    assert draw_text(timeline, Pipeline(1, 4), 8 + 4)[0] == "rank 0  BBBB"


def test_the_picture_has_a_bar_for_each_entry_at_its_time(tmp_path: Path) -> None:
    shape = Pipeline(2, 3, rounds=2)
    timeline = played("interleaved", shape, Costs(1, 1, 1))
    figure = timeline_figure(timeline, shape, "a title")
    plot = figure.axes[0]
    bars = {(round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width()) for bar in plot.patches}
    turns = {
        (rank, float(turn.start), float(turn.end - turn.start))
        for rank, turns in enumerate(timeline.ranks)
        for turn in turns
    }
    assert bars == turns
    assert plot.get_title() == "a title"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["forward", "backward"]
    png = tmp_path / "pictures" / "schedule.png"
    draw_picture(timeline, shape, "a title", png)
    image = imread(png)[..., :3]
    # the first round's forward passes are there in their colour, and so is the darker one of the second
    for shade in (1.0, 0.75):
        colour = np.array(to_rgb(COLOURS["forward"])) * shade
        assert (np.abs(image - colour).max(axis=-1) < 0.02).sum() > 500


def test_a_picture_of_many_entries_has_no_numbers() -> None:
    shape = Pipeline(20, 40)
    plot = timeline_figure(played("1f1b", shape, Costs(1, 1, 1)), shape, "many").axes[0]
    assert len(plot.texts) == 0 and len(plot.patches) == 2 * 20 * 40
    pairs = Pipeline(2, 4)
    plot = timeline_figure(played("1f1b_overlap", pairs, Costs(1, 1, 1)), pairs, "pairs").axes[0]
    assert "3/0" in {text.get_text() for text in plot.texts}
