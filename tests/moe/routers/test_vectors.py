"""Every router against an oracle of loops: stored vectors, and random shapes, types and padding."""

import json
from pathlib import Path

import pytest
import torch
from golden.write_vectors import FOLDER, as_json
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_rows import weights_of
from oracles.case import Expected
from oracles.cases import Shape, ask_router, info_of, make_case
from oracles.registry import CASES, ORACLES
from vectors import nearly

from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.moe.routers.registry import ROUTERS

FILES = sorted(FOLDER.glob("*.json"))


def hold(plan: RoutingPlan, expected: Expected, tolerance: float) -> None:
    """The same pairs, weights and losses."""
    assert weights_of(plan) == pytest.approx(expected.pairs, rel=tolerance, abs=tolerance)
    found = {name: (loss.share.item(), float(loss.weight), loss.per) for name, loss in plan.aux_losses.items()}
    assert found.keys() == expected.losses.keys()
    for name, (share, weight, per) in expected.losses.items():
        assert found[name][0] == pytest.approx(share, rel=tolerance, abs=tolerance), name
        assert found[name][1:] == (pytest.approx(weight, rel=1e-12), per), name


def test_every_router_has_an_oracle_and_stored_vectors() -> None:
    assert set(ORACLES) == set(ROUTERS) == {fields["router_type"] for fields in CASES.values()}
    assert {path.stem for path in FILES} == {f"{name}-{kind}" for name in CASES for kind in ("train", "eval")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_vectors_are_what_the_router_does(path: Path) -> None:
    name, _, kind = path.stem.rpartition("-")
    stored = json.loads(path.read_text(encoding="utf-8"))
    case = make_case(name, CASES[name], Shape(train=kind == "train"))
    expected = Expected({(t, e): w for t, e, w in stored["expected"]["assignments"]})
    expected.losses = {key: tuple(value) for key, value in stored["expected"]["losses"].items()}
    hold(ask_router(case, info_of(CASES[name], Shape(train=kind == "train"))), expected, 1e-10)
    # the file holds all of the question, and the oracle still answers it alike
    again = json.loads(json.dumps(as_json(case, ORACLES[CASES[name]["router_type"]](case))))
    assert nearly(again, stored)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 9),
    samples=st.integers(1, 4),
    hidden=st.integers(2, 7),
    experts=st.sampled_from([4, 8]),
    train=st.booleans(),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_random_questions_get_the_oracles_answer(
    name: str, length: int, samples: int, hidden: int, experts: int, train: bool, seed: int, dtype: torch.dtype
) -> None:
    shape = Shape(length, samples, hidden, experts, train, seed)
    case = make_case(name, CASES[name], shape)
    expected = ORACLES[CASES[name]["router_type"]](case)
    plan = ask_router(case, info_of(CASES[name], shape), dtype)
    if dtype == torch.float64:
        hold(plan, expected, 1e-9)
        return
    # a score may stand too near another for float32 to tell: the weights served must agree nearly everywhere
    found = weights_of(plan)
    agree = [pair for pair in expected.pairs if pair in found and abs(found[pair] - expected.pairs[pair]) < 1e-4]
    assert len(agree) >= 0.9 * len(expected.pairs) - 1
