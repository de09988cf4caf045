"""The router study: runs are kept and not repeated, seeds are paired, and a claim says no more than was seen."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_moe.config.errors import DataError
from megatron_moe.training.flops import flops_per_token
from tools.benchmark.router_study import chosen_jobs, main, parse, waiting
from tools.benchmark.study.arms import SIZES, arms_of, sparse
from tools.benchmark.study.claims import T_QUANTILES, Difference, paired, verdict
from tools.benchmark.study.ledger import add, key_of, read, same
from tools.benchmark.study.run import Arm, code_version, config_of, run
from tools.benchmark.study.tables import claims, dense_gap, grid_table, main_table, memory_table, newest
from tools.benchmark.study.text import Text, load_text, training_batch, trial_batches

SMOKE = SIZES["smoke"]
DENSE, SWITCH = Arm("dense", "main"), Arm("switch", "main", sparse("switch", 64, aux_loss_coeff=0.01))
COSINE = Path(__file__).parents[2] / "examples" / "router" / "cosine_router.py"


@pytest.fixture(scope="module")
def text() -> Text:
    return load_text()


def test_the_text_is_real_and_its_parts_differ(text: Text) -> None:
    assert min(len(text.train), len(text.valid), len(text.unlike)) > 100_000
    assert len(text.fingerprint) == 12 and load_text().fingerprint == text.fingerprint
    # prose is nearer to the bigrams of source code than to chance, but it is not the same text
    assert 1.5 < text.bigram("valid") < text.bigram("unlike") + 1.0 < math.log(256)
    assert text.valid[:1000].tobytes() not in text.train.tobytes()


def test_every_model_sees_the_same_batches(text: Text) -> None:
    first = training_batch(text, seed=1, step=2, samples=3, length=16)
    again = training_batch(text, seed=1, step=2, samples=3, length=16)
    other = training_batch(text, seed=2, step=2, samples=3, length=16)
    assert torch.equal(first.decoder.tokens, again.decoder.tokens)
    assert not torch.equal(first.decoder.tokens, other.decoder.tokens)
    assert torch.equal(first.decoder.tokens[:, 1:], first.decoder.labels[:, :-1])
    assert first.sample_ids.tolist() == [6, 7, 8]
    later = training_batch(text, seed=1, step=3, samples=3, length=16)
    assert not torch.equal(first.decoder.tokens, later.decoder.tokens)
    trials = trial_batches(text.valid, samples=2, length=8, batches=3)
    assert [batch.decoder.tokens.shape for batch in trials] == [(2, 8)] * 3
    # from the first byte to the last
    assert bytes(trials[0].decoder.tokens[0].tolist()) == text.valid[:8].tobytes()
    assert bytes(trials[-1].decoder.labels[-1].tolist()) == text.valid[-9:-1].tobytes()


def test_intervals_are_students() -> None:
    mine, other = {0: 1.0, 1: 1.2, 2: 0.9, 5: 7.0}, {0: 1.1, 1: 1.15, 2: 1.2, 4: 3.0}
    found = paired(mine, other)
    assert found is not None and found.half_width is not None
    gaps = np.array([-0.1, 0.05, -0.3])
    low, high = stats.t.interval(0.95, 2, loc=gaps.mean(), scale=stats.sem(gaps))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high), rel=1e-3)
    assert found.seeds == 3
    assert pytest.approx(stats.t.ppf(0.975, range(1, 11)), abs=5e-4) == T_QUANTILES
    assert paired(mine, {9: 1.0}) is None
    assert str(paired({1: 2.0}, {1: 1.0})) == "+1.000 (one seed)"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Difference(-0.10, 0.02, 3), "seen"),
        (Difference(-0.10, 0.12, 3), "underpowered"),
        (Difference(0.05, 0.03, 3), "not seen"),
        (Difference(0.00, 0.05, 3), "underpowered"),
        (Difference(0.00, 0.005, 3), "not seen"),  # an advantage of 0.01 is excluded
        (Difference(-1.0, None, 1), "underpowered"),
        (None, "underpowered"),
    ],
)
def test_a_claim_says_no_more_than_was_seen(found: Difference | None, said: str) -> None:
    assert verdict(found, smallest=0.01) == said


def test_a_run_learns_reports_and_repeats_itself(text: Text) -> None:
    found = run(SWITCH, SMOKE, 0, text)
    assert found["curve"][-1][1] == found["loss"] < found["curve"][0][1] < 6.0
    assert found["curve"][-1][0] == SMOKE.steps and found["unlike"] != found["loss"]
    assert found["bigram"] == text.bigram("valid")
    assert 0 < found["router_moved"] < 10 and found["max_violation"] >= 0 and found["drop_rate"] == 0
    # experts and tokens over four ranks: three of four rows leave theirs when routing is even
    assert 0.5 < found["rows_per_token"] <= 1.0
    assert run(SWITCH, SMOKE, 0, text)["loss"] == found["loss"] != run(SWITCH, SMOKE, 1, text)["loss"]
    dense = run(DENSE, SMOKE, 0, text)
    assert dense["rows_per_token"] is None
    # both layers have a router of eight rows: three passes of two FLOPs for each of their weights
    assert found["flops_per_token"] - dense["flops_per_token"] == 3 * 2 * 2 * 8 * 32
    assert dense["flops_per_token"] == flops_per_token(config_of(DENSE, SMOKE, 0), 256)


def test_a_frozen_router_stays_where_it_is(text: Text) -> None:
    frozen = run(Arm("switch, frozen router", "main", SWITCH.moe, frozen=True), SMOKE, 0, text)
    assert frozen["router_moved"] == 0.0
    assert frozen["loss"] != run(SWITCH, SMOKE, 0, text)["loss"]


def test_a_run_that_is_there_is_not_repeated(text: Text, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    key = key_of(SWITCH, SMOKE, 0, text.fingerprint)
    line = add(ledger, key, {"loss": 1.0})
    assert same(line, key) and read(ledger) == [json.loads(json.dumps(line))]
    jobs = [(SWITCH, SMOKE, 0), (SWITCH, SMOKE, 1), (DENSE, SMOKE, 0)]
    assert waiting(jobs, ledger, text) == jobs[1:]
    # another version of the code makes it another run
    assert not same({**line, "code": "other"}, key)


def test_a_key_tells_runs_apart_and_later_runs_stand_behind_earlier_ones(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    key = key_of(SWITCH, SMOKE, 0, "text")
    assert key["code"] == code_version() and len(code_version()) == 12
    others = [key_of(replace(SWITCH, frozen=True), SMOKE, 0, "text"), key_of(SWITCH, replace(SMOKE, lr=9.0), 0, "text")]
    assert not any(same(key, other) for other in others)
    lines = [add(ledger, one, {"loss": loss}) for one, loss in zip((key, *others), (1.0, 2.0, 3.0), strict=True)]
    assert [line["loss"] for line in read(ledger)] == [line["loss"] for line in lines] == [1.0, 2.0, 3.0]
    ledger.write_text(json.dumps(key))
    with pytest.raises(DataError, match="line 1 has no 'loss'"):
        read(ledger)


@pytest.mark.parametrize(("broken", "message"), [("{", "line 2 is no JSON"), ("{}", "line 2 has no 'arm'")])
def test_a_broken_ledger_is_named_by_line(broken: str, message: str, text: Text, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    add(ledger, key_of(SWITCH, SMOKE, 0, text.fingerprint), {"loss": 1.0})
    with ledger.open("a") as file:
        file.write(broken + "\n")
    with pytest.raises(DataError, match=message):
        read(ledger)


def line_of(arm: Arm, seed: int, loss: float) -> dict[str, Any]:
    figures = {"loss": loss, "unlike": loss, "curve": [[5, 3.0], [10, loss]], "bigram": 2.5}
    more = dict.fromkeys(("max_violation", "drop_rate", "rows_per_token", "router_moved"))
    sizes = {"seconds_per_step": 0.1, "flops_per_token": 1e6, "parameters": 1e6}
    return {**key_of(arm, SMOKE, seed, "text"), **figures, **more, **sizes}


def test_tables_pair_seeds_and_measure_against_the_dense_gap() -> None:
    lines = [line_of(DENSE, seed, 2.2 + 0.1 * seed) for seed in range(3)]
    lines += [line_of(SWITCH, seed, 2.1 + 0.1 * seed) for seed in range(3)]
    arms = newest(lines, "smoke")
    assert dense_gap(arms) == pytest.approx(0.1)
    table = main_table(arms, ["dense", "switch"])
    # seeds differ by more than the two models, and still the difference is exact
    assert "| switch | 3 | 2.200 | -0.100 ± 0.000, seen |" in table
    assert "| 10 |" in table.splitlines()[-1]


def test_a_claim_is_held_against_a_tenth_of_the_better_sparse_models_lead() -> None:
    losses = {"dense": 2.0, "switch": 1.9, "top_k": 1.5, "thor": 1.98}
    lines = [line_of(Arm(name, "main"), seed, loss + 0.01 * seed) for name, loss in losses.items() for seed in (0, 1)]
    arms = newest([*lines, line_of(DENSE, 0, 9.0) | {"size": {"name": "other"}}], "smoke")
    assert dense_gap(arms) == pytest.approx(0.5)
    said = claims(arms).splitlines()
    assert said[0].endswith("-0.500 ± 0.000 nats per byte, **seen**")
    assert said[5].startswith("- learned (Switch) beats random (THOR) routing: -0.080 ± 0.000")
    assert said[2].endswith(": - nats per byte, **underpowered**")
    frozen = [line_of(Arm("switch, frozen router", "main"), seed, 2.4 + 0.01 * seed) for seed in (0, 1)]
    row = main_table(newest([*lines, *frozen], "smoke"), ["switch", "switch, frozen router"]).splitlines()[-1]
    assert row.startswith("| switch | 2 | 1.905 | -0.100 ± 0.000, seen | -0.500 ± 0.000, seen |")
    assert row.endswith("| 100 | 1.00 | 1.00 |")
    # an advantage of 0.1 is not excluded, and more than a tenth of the lead
    behind = [line_of(replace(SWITCH, name="later"), seed, loss) for seed, loss in enumerate((1.99, 2.02))]
    table = main_table(newest([*lines, *behind], "smoke"), ["later"])
    assert "| later | 2 | 2.005 | +0.000 ± 0.127, underpowered |" in table


def test_claims_of_pairs_name_their_own_sides() -> None:
    pairs = {"E=64 k=8": 1.0, "E=64 k=1": 1.25, "thor, two passes": 2.0, "thor": 2.5, "g=4 avg_k": 3.0}
    more = {"g=4 learned gate": 3.125, "g=32 avg_k": 7.0, "g=32 learned gate": 6.0}
    arms = newest([line_of(Arm(name, "main"), 0, loss) for name, loss in (pairs | more).items()], "smoke")
    said = claims(arms).splitlines()
    assert [said[place].split(": ")[-1].split()[0] for place in (2, 4, 6)] == ["-0.250", "-0.500", "-0.125"]


def test_grids_compare_with_the_first_column_and_memories_are_tried_on_prose() -> None:
    lines = [line_of(Arm(f"E=8 k={k}", "sam"), 0, loss) for k, loss in ((1, 2.0), (2, 1.75), (4, 1.5))]
    table = grid_table(newest(lines, "smoke"), "E", ["8"], ["1", "2", "4"], "E={row} k={column}")
    assert table.splitlines()[-1] == "| 8 | 2.000 | 1.750 (-0.250 (one seed)) | 1.500 (-0.500 (one seed)) |"
    line = {**line_of(Arm("g=4 avg_k", "memory"), 0, 2.0), "unlike": 3.5}
    row = memory_table(newest([line], "smoke"), ["g=4 avg_k", "not run"]).splitlines()[-1]
    assert row == "| g=4 avg_k | 1 | 2.000 | 3.500 | - | 1.00 | 100 |"


def test_the_latest_seed_below_the_bigram_model_is_told() -> None:
    first, late, never = (line_of(DENSE, seed, 2.0) for seed in range(3))
    late["curve"], never["curve"] = [[5, 2.0], [10, 2.0]], [[5, 3.0], [10, 2.5]]
    told = [main_table(newest(lines, "smoke"), ["dense"]) for lines in ([first, late], [first, never])]
    assert [text.splitlines()[-1].split(" | ")[5] for text in told] == ["10", "not yet"]


def test_every_arm_is_a_model_that_can_be_configured() -> None:
    for arm in arms_of(["main", "sam", "memory"], SIZES["tiny"]):
        assert config_of(arm, SIZES["tiny"], 0).moe.num_experts == arm.moe.get("num_experts", 0)
    names = [arm.name for arm in arms_of(["main", "sam", "memory"], SIZES["tiny"])]
    assert len(set(names)) == len(names)


def test_a_router_of_your_own_is_a_further_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"{COSINE}:CosineRouter"
    given = ["--smoke", "--only", "dense", "--router", own, "--ledger", str(tmp_path / "ledger.jsonl")]
    assert [arm.name for arm, _, _ in chosen_jobs(parse(given))] == ["dense", own]
    assert main([*given, "--output", str(tmp_path / "study.md"), "--picture", str(tmp_path / "study.png")]) == 0
    assert own in (tmp_path / "study.md").read_text() and (tmp_path / "study.png").stat().st_size > 1000
    capsys.readouterr()
    assert main([*given, "--report"]) == 0
    assert "nats per byte" in capsys.readouterr().out
    assert main(["--only", "nobody"]) == 2
    assert "there is no such arm" in capsys.readouterr().err
