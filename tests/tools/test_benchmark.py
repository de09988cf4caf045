"""The device check runs at small sizes, says what it found in one form, and fails when something is wrong.

No timing is asserted: only that there is one.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.benchmark import ceilings, correctness, moe_layer, results, training_step
from tools.benchmark.timing import Clock, measure, saved_bytes

ROOT = Path(__file__).parents[2]
SMALL = ["--quick", "--device", "cpu"]


class Ticks(Clock):
    """A clock whose calls say themselves how long they took."""

    method = "ticks"

    def time(self, call: Callable[[], object]) -> float:
        return float(str(call()))


def ticking(seconds: float, log: list[tuple[float, int]]) -> Callable[[int], object]:
    def call(turn: int) -> object:
        log.append((seconds, turn))
        return seconds

    return call


def run_part(main: Callable[[list[str]], int], folder: Path) -> dict[str, Any]:
    assert main(["--folder", str(folder), *SMALL]) == 0
    found: dict[str, Any] = json.loads((folder / f"{main.__module__.rpartition('.')[2]}.json").read_text())
    return found


def record(folder: Path) -> results.Recorder:
    return results.Recorder("made_up", folder, torch.device("cpu"), True, math.inf)


def test_peers_take_turns_and_a_slow_one_leaves_early() -> None:
    log: list[tuple[float, int]] = []
    variants = {str(seconds): ticking(seconds, log) for seconds in (1.0, 2.0, 100.0)}
    timings = measure(variants, Ticks(), seconds=318.0, least=3, most=9)
    assert {name: timing.iterations for name, timing in timings.items()} == {"1.0": 6, "2.0": 6, "100.0": 3}
    assert timings["2.0"].median == timings["2.0"].lowest == 2.0
    order = [seconds for seconds, _ in log[6:]]
    assert order == [1.0, 2.0, 100.0, 2.0, 100.0, 1.0, 100.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0, 1.0]
    assert [turn for _, turn in log[6:12]] == [0, 0, 0, 1, 1, 1]


def test_saved_bytes_count_each_storage_once_and_no_weights() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    rows = torch.randn(16, 8, requires_grad=True)
    # the product keeps rows and weight, the square its argument
    assert saved_bytes(lambda: (rows @ weight).square(), [weight]) == 2 * 16 * 8 * 4


def test_the_checks_pass_and_cover_every_operation(tmp_path: Path) -> None:
    found = run_part(correctness.main, tmp_path)
    assert [check for check in found["checks"] if not check["passed"]] == []
    names = " ".join(check["name"] for check in found["checks"])
    for operation in ("native product", "permute", "rotary", "swiglu", "cross-entropy", "attention", "update"):
        assert f"{operation}" in names
    assert all(check["why"] and check["tolerance"] > 0 for check in found["checks"])


def test_a_wrong_answer_and_an_unwritten_one_fail(tmp_path: Path) -> None:
    wrong = record(tmp_path)
    inputs = [torch.randn(50, dtype=torch.float64)]
    correctness.compare("right", lambda x: 3 * x, lambda x: 3 * x, inputs, "fp32", wrong)
    correctness.compare("wrong", lambda x: 3.01 * x, lambda x: 3 * x, inputs, "fp32", wrong)
    correctness.compare("unwritten", lambda x: x * math.nan, lambda x: 3 * x, inputs, "fp32", wrong)
    assert [check["passed"] for check in wrong.checks] == [True, False, False]


@pytest.mark.parametrize("main", [ceilings.main, moe_layer.main, training_step.main])
def test_a_part_leaves_figures_with_unit_shape_and_method(main: Callable[[list[str]], int], tmp_path: Path) -> None:
    if main is moe_layer.main:
        pytest.importorskip("transformers")
    found = run_part(main, tmp_path)
    assert found["checks"] == [] or all(check["passed"] for check in found["checks"])
    assert found["skipped"] == []
    for figure in found["figures"]:
        assert math.isfinite(figure["value"]) and figure["value"] >= 0 and figure["shape"] is not None
        assert {"part", "name", "unit"} <= figure.keys()
        if figure["unit"] == "ms":
            assert figure["lowest"] <= figure["value"] <= figure["highest"]
            assert figure["iterations"] >= 3 and "process_time" in figure["method"]


def test_results_are_joined_named_and_never_overwritten(tmp_path: Path) -> None:
    part = record(tmp_path)
    part.figure("speed", 2.0, "GB/s", {"bytes": 8}, headline=True)
    part.check("exact", 0.0, 0.1, "it is")
    part.skip("a peer", "is not installed")
    (tmp_path / "parts.txt").write_text("made_up 0 3\n")
    found = results.collect(tmp_path, "a label")
    assert found["label"] == "a label" and found["parts"]["made_up"]["exit_code"] == 0
    assert {"date", "machine", "figures", "checks", "skipped", "tests"} <= found.keys()
    assert {"device", "driver", "torch", "python", "libraries", "commit"} <= found["machine"].keys()
    assert results.healthy(found)
    text = results.table(found)
    assert "speed" in text and "1 passed, 0 failed" in text and "a peer: is not installed" in text
    first, second = results.save(found, tmp_path / "out"), results.save(found, tmp_path / "out")
    assert first != second and json.loads(first.read_text())["figures"] == found["figures"]
    assert first.name.startswith(found["date"][:10])


def test_a_failed_check_or_test_or_a_stopped_part_is_no_success(tmp_path: Path) -> None:
    part = record(tmp_path)
    part.check("off", math.nan, 0.1, "it should not be")
    assert not results.healthy(results.collect(tmp_path, ""))
    part.checks.clear()
    part.skip("nothing", "to save")
    assert results.healthy(results.collect(tmp_path, ""))
    (tmp_path / "parts.txt").write_text("made_up 124 90\n")
    assert not results.healthy(results.collect(tmp_path, ""))
    (tmp_path / "parts.txt").unlink()
    case = '<testcase classname="a" name="{}">{}</testcase>'
    cases = case.format("b", "<failure/>") + case.format("c", "") + case.format("d", "<skipped/>")
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = results.collect(tmp_path, "")
    assert found["tests"] == {"passed": 1, "failed": ["a.b"], "skipped": ["a.d"]}
    assert not results.healthy(found)


def test_the_script_runs_a_part_and_writes_the_file(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = [
        "bash",
        str(ROOT / "tools/benchmark/gpu_check.sh"),
        *SMALL,
        "--only",
        "ceilings",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(script, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*-quick.json")
    found = json.loads(file.read_text())
    assert list(found["parts"]) == ["ceilings"] and len(found["figures"]) == 3
    assert f"written: {file}" in done.stdout


def test_the_script_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "tools/benchmark/gpu_check.sh"), "--fast"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "unknown argument --fast" in done.stderr
