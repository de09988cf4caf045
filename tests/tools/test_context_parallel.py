"""The comparison of ways over cut sequences runs at small sizes and says what it needs. No timing is asserted."""

import json
from typing import Any

import pytest

from tools.benchmark.context_parallel import main

SMALL = ["--seq-length", "16", "--heads", "4", "--head-dim", "4", "--rounds", "1"]


def test_every_way_has_a_line_for_each_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == 0
    lines: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [(line["way"], line["causal"]) for line in lines] == [
        (way, causal) for causal in (True, False) for way in ("all_gather", "p2p", "a2a")
    ]
    rows = 16 // 2 * 2 * 4 * 4  # bytes of the keys of a rank
    sent = {"all_gather": 2 * 2 * rows, "p2p": 3 * 2 * rows, "a2a": 2 * (2 * 2 * rows + 2 * rows) // 2}
    for line in lines:
        assert line["sent_bytes"] == sent[line["way"]]
        assert line["seconds"] > 0 and line["cpu_seconds"] > 0
        assert line["peak_bytes"] > 0 and line["kept_bytes"] > 0


def test_the_table_compares_with_gathered_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    assert "2 ranks, S 16" in out
    (gathered,) = [line for line in out.splitlines() if line.startswith("| causal | all_gather |")]
    assert gathered.endswith("| 1.00 | 1.00 | 1.00 |")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "1"], "--ranks 1: one rank cuts nothing"),
        (["--seq-length", "18"], "--seq-length 18: expected a multiple of 2 x --ranks 2"),
        (["--heads", "3"], "--heads 3: expected a multiple of --ranks 2 and of --groups 2"),
        (["--rounds", "0"], "--rounds 0: expected an integer of at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *flags]) == 2
    assert message in capsys.readouterr().err
