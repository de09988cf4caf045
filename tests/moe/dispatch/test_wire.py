"""What leaves a rank of eight: as many rows as the formula says, and for SAM no more with more experts per token."""

import json
import math
from typing import Any

import pytest
from ranks import run_on_ranks

from megatron_moe.config.errors import ConfigError
from tools.benchmark.wire_bytes import BY_NODE, Case, Sent, cases_of, groups_for, main, ranks_of, send_all

RANKS, TOKENS, HIDDEN = 8, 128, 96
NODES, INSIDE = 2, 4
# groups that are two to a rank beside those of the table
MORE = [Case("sam flat", 64, 4, 16), Case("sam hierarchical", 64, 4, 16), Case("sam flat", 64, 2, 2)]


@pytest.fixture(scope="module")
def sent() -> dict[Case, list[Sent]]:
    """What left each rank, for every case."""
    cases = [*cases_of((8, 16, 64), (1, 2, 4, 8), RANKS, NODES), *MORE]
    answers = run_on_ranks(RANKS, send_all, cases, TOKENS, HIDDEN, NODES)
    return {case: [answer[number] for answer in answers] for number, case in enumerate(cases)}


def rows(parts: list[Sent]) -> int:
    """Of the first transfer, from all ranks."""
    return sum(part.rows[0] for part in parts)


def between(parts: list[Sent]) -> int:
    """Those of them that left their node."""
    return sum(part.between[0] for part in parts)


def test_all_four_transfers_carry_the_same_rows(sent: dict[Case, list[Sent]]) -> None:
    for case, parts in sent.items():
        totals = [sum(found) for found in zip(*(part.rows for part in parts), strict=True)]
        assert len(totals) == 4 and len(set(totals)) == 1, case
        assert sum(part.row_bytes for part in parts) == 2 * HIDDEN * sum(totals)


def test_rows_are_those_of_the_formula(sent: dict[Case, list[Sent]]) -> None:
    everyone = RANKS * TOKENS
    for case, parts in sent.items():
        by_chance = case.dispatcher == "one_per_rank" and (case.groups is None or case == MORE[-1]) and case.choices > 1
        by_chance = by_chance and case.experts > RANKS
        wanted, crossing = case.formula(RANKS, NODES), case.between(RANKS, NODES)
        if by_chance or (case.dispatcher == "hierarchical" and case.choices > 1):
            # a token and its seven images count as one draw; the number of ranks, or nodes, has a deviation below 1
            assert rows(parts) / everyone == pytest.approx(wanted, abs=4 / math.sqrt(everyone / RANKS))
            assert between(parts) / everyone == pytest.approx(crossing, abs=4 / math.sqrt(everyone / RANKS))
        else:
            assert rows(parts) == round(everyone * wanted, 9), case
            assert between(parts) == round(everyone * crossing, 9), case


def test_a_token_visits_each_rank_that_holds_any_of_its_experts_once(sent: dict[Case, list[Sent]]) -> None:
    for case, parts in sent.items():
        visited = sum(part.visited for part in parts)
        if case.dispatcher == "one_per_rank":
            # except the own one
            assert RANKS * rows(parts) == (RANKS - 1) * visited
            assert NODES * between(parts) == (NODES - 1) * visited
        if case.dispatcher == "hierarchical":
            assert INSIDE * (rows(parts) - between(parts)) == (INSIDE - 1) * visited


def test_by_node_fewer_rows_cross_and_at_best_one_of_k(sent: dict[Case, list[Sent]]) -> None:
    crossing = {(case.method, case.experts, case.choices): between(parts) for case, parts in sent.items()}
    for experts in (8, 16, 64):
        for k in (1, 2, 4, 8):
            flat, once = crossing["top_k", experts, k], crossing["top_k, one per rank", experts, k]
            assert flat / k <= crossing[BY_NODE, experts, k] <= once <= flat
        # 8 of 64 experts stand on 1.996 nodes
        assert 3.9 * crossing[BY_NODE, experts, 8] < crossing["top_k", experts, 8]


def test_sam_sends_one_row_whatever_k_is_and_top_k_sends_k(sent: dict[Case, list[Sent]]) -> None:
    one_row = RANKS * TOKENS * (RANKS - 1) // RANKS
    for case, parts in sent.items():
        if case.groups is not None and case.groups % RANKS == 0:
            assert rows(parts) == one_row
        if case.method == "switch":
            assert rows(parts) == one_row
        if case.method == "top_k":
            assert rows(parts) == one_row * case.choices
    independent = {(case.method, case.choices) for case in sent if case.experts == 64 and case.groups == 8}
    flat = {("sam flat", k) for k in (1, 2, 4, 8)}
    assert independent == flat | {("sam hierarchical", k) for k in (1, 2, 4, 8)}


def test_what_goes_with_the_rows_is_sixteen_bytes_for_each_assignment(sent: dict[Case, list[Sent]]) -> None:
    for case, parts in sent.items():
        if case.dispatcher == "one_per_rank":
            # where it goes (8), its weight (4), the weight's gradient (4); two counts to each other rank
            pairs = RANKS * TOKENS * case.choices * (RANKS - 1) // RANKS
            assert sum(part.other_bytes for part in parts) == 16 * pairs + 2 * 8 * RANKS * (RANKS - 1)
        if case.dispatcher == "hierarchical":
            halves = [RANKS * TOKENS * case.choices * (size - 1) // size for size in (NODES, INSIDE)]
            counts = 2 * 8 * RANKS * (NODES - 1 + INSIDE - 1)
            assert sum(part.other_bytes for part in parts) == 16 * sum(halves) + counts


@pytest.mark.parametrize(
    ("choices", "experts", "ranks", "expected"),
    [(2, 8, 8, 2.0), (2, 64, 8, 1.89), (8, 64, 8, 5.43), (8, 128, 8, 5.34), (8, 256, 8, 5.29), (2, 8, 2, 1.571)],
)
def test_distinct_ranks_are_those_of_published_models(choices: int, experts: int, ranks: int, expected: float) -> None:
    assert ranks_of(choices, experts, ranks) == pytest.approx(expected, abs=5e-3)


def test_groups_are_as_many_as_ranks_where_they_hold_enough_experts() -> None:
    assert [groups_for(64, k, 8) for k in (1, 8, 9, 64)] == [8, 8, 4, 1]
    assert [groups_for(24, k, 8) for k in (2, 5, 20)] == [8, 4, 1]


def test_the_table_and_its_lines_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--ranks", "2", "--experts", "4", "--topk", "2", "--tokens", "8", "--hidden-size", "16"]
    assert main([*given, "--json"]) == 0
    lines: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [(line["method"], line["rows_per_token"], line["formula"]) for line in lines if line["groups"]] == [
        ("sam flat", 0.5, 0.5),
        ("sam hierarchical", 0.5, 0.5),
    ]
    assert {line["formula"] for line in lines if line["method"] == "top_k"} == {1.0}
    assert all(line["rows_per_token"] == line["formula"] for line in lines if line["method"] == "top_k")
    # eight assignments of each rank's 16 leave it, 16 bytes each; two counts go to the other rank
    assert {line["other_bytes_per_token"] for line in lines if line["groups"]} == {(16 * 8 + 2 * 8) / 8}
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "| 4 | 2 | sam flat | 2 | 0.500 | 0.500 | 64 |" in text
    assert "Rows to oneself are not counted" in text and "between nodes" not in text
    assert main([*given, "--nodes", "2"]) == 0
    text = capsys.readouterr().out
    assert "| rows | formula | between nodes | formula | bytes of rows |" in text
    assert "| 4 | 2 | sam flat | 2 | 0.500 | 0.500 | 0.500 | 0.500 | 64 |" in text
    assert f"| 4 | 2 | {BY_NODE} | - |" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--ranks", "1"], "--ranks 1: nothing leaves a rank alone"),
        (["--nodes", "3"], "--nodes 3: expected a number that divides --ranks 8"),
        (["--nodes", "0"], "--nodes 0: expected a number that divides --ranks 8"),
        (["--tokens", "9"], "--tokens 9: expected a multiple of --ranks 8"),
        (["--tokens", "0"], "--tokens 0: expected a multiple of --ranks 8"),
        (["--topk", "0"], "--topk 0: expected an integer of at least 1"),
        (["--hidden-size", "16"], "--hidden-size 16 is too narrow"),
        (["--hidden-size", "71"], "--hidden-size 71 is too narrow for the logits; use 72"),
        (["--experts", "12"], "--experts 12: expected a multiple of --ranks 8"),
    ],
)
def test_what_cannot_be_counted_is_refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == ConfigError.exit_code
    assert message in capsys.readouterr().err
