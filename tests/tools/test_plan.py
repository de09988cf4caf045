"""The plan command draws every schedule, says what it costs, and refuses by name what it cannot draw."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tools.plan import DRAWN, main


def run(text: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(text.split())
    out, err = capsys.readouterr()
    return code, out, err


def test_a_schedule_is_drawn_with_time_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("--show-schedule 1f1b --pipeline-ranks 2 --microbatches 2 --width 80", capsys)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "1f1b: 2 ranks, 2 microbatches, 33.33 % idle",
        "",
        "rank 0  F0F1....B0--..B1--",
        "rank 1  ..F0B0--F1B1--....",
        "time 1 = 2 columns; F forward, B backward, . idle",
        "",
        "time        9",
        "idle share  33.33 % simulated, 33.33 % by the formula",
        "bubble      (p-1)·(F+B), a rank on average",
        "memory      most microbatches whose activations are held: 2, 1",
    ]


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("shape", ["--pipeline-ranks 4 --microbatches 7", "--pipeline-ranks 9 --microbatches 100"])
def test_every_schedule_is_simulated_to_its_formula(
    name: str, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(f"--show-schedule {name} {shape} --costs 0.9,1.1,.8", capsys)
    assert (code, err) == (0, "")
    (line,) = (line for line in out.splitlines() if line.startswith("idle share"))
    simulated, formula = line.removeprefix("idle share").split(",")
    assert simulated.split()[0] == formula.split()[0]


def test_latency_comes_on_top_of_the_formula(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("--show-schedule 1f1b --pipeline-ranks 2 --microbatches 2 --latency 0.5", capsys)
    assert "40.00 % simulated, 33.33 % by the formula without latency" in out
    # half of the shorter pass is hidden: F, B + F/2, B
    _, out, _ = run("--show-schedule 1f1b_overlap --pipeline-ranks 1 --microbatches 2 --overlap 0.5", capsys)
    assert "time        5.5" in out


def test_rounds_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("--show-schedule interleaved --pipeline-ranks 2 --microbatches 4 --rounds 2", capsys)
    assert "interleaved: 2 ranks, 2 rounds, 4 microbatches, 11.11 % idle" in out
    assert "most passes of a microbatch through a stage whose activations are held: 5, 3" in out
    wide = run("--show-schedule interleaved --pipeline-ranks 2 --microbatches 4 --rounds 2 --group 4", capsys)[1]
    assert "held: 7, 5" in wide


def test_the_memory_of_many_ranks_is_told_briefly(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("--show-schedule 1f1b --pipeline-ranks 20 --microbatches 20", capsys)
    assert out.endswith("held: 20 on rank 0, down to 1 on rank 19\n")
    _, out, _ = run("--show-schedule zb_h1 --pipeline-ranks 20 --microbatches 20", capsys)
    assert out.endswith("held: 20 on each rank\n")


def test_a_picture_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "zb_h1.png"
    assert run(f"--show-schedule zb_h1 --png {png}", capsys)[0] == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_only_the_picture_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("--show-schedule 1f1b", capsys)[0] == 0
    code, out, err = run(f"--show-schedule 1f1b --png {tmp_path / 'a.png'}", capsys)
    assert (code, out) == (2, "")
    assert 'pip install "megatron_moe[log]"' in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nothing", "--show-schedule nothing: expected one of sequential, 1f1b,"),
        ("1f1b --pipeline-ranks 0", "--pipeline-ranks 0: expected 1 or more"),
        ("1f1b --microbatches -1", "--microbatches -1: expected 1 or more"),
        ("1f1b --rounds 2", "--rounds 2: the schedule '1f1b' has one stage a rank"),
        ("interleaved --rounds 2 --group 3", "--group 3: a group of 3 microbatches is too small for 4 pipeline ranks"),
        ("interleaved --group 4", "--group 4 changes nothing here"),
        ("sequential --rounds 2 --group 4", "--group 4 changes nothing here; it does with --rounds 2 or more of"),
        ("1f1b --overlap 1", "--overlap 1: this pipeline has no pairs of passes; '1f1b_overlap' has"),
        ("1f1b_overlap --overlap 2", "--overlap 2: expected a share from 0 to 1"),
        ("1f1b --costs 1,1", "--costs 1,1: expected three times"),
        ("1f1b --costs 1,x,1", "--costs x: expected a number"),
        ("1f1b --costs 1,-2,1", "--costs -2: expected 0 or more"),
        ("1f1b --costs 0,1,1", "--costs 0,1,1: a forward pass takes some time"),
        ("1f1b --latency 1/0", "--latency 1/0: expected a number"),
        ("1f1b --width 0", "--width 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(f"--show-schedule {given}", capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: " + said)


def test_something_must_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "--show-schedule" in capsys.readouterr().err
