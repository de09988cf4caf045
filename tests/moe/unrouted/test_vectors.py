"""Every layer that assigns nothing against an oracle of loops: stored vectors, and random shapes and padding."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden.write_vectors import LAYER_FOLDER, layer_as_json
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.cases import Shape, ask_layer, info_of, make_case
from oracles.layers import LAYER_CASES, LAYER_ORACLES
from vectors import nearly

from megatron_moe.moe.unrouted.registry import UNROUTED

FILES = sorted(LAYER_FOLDER.glob("*.json"))


def test_every_layer_has_an_oracle_and_stored_vectors() -> None:
    assert set(LAYER_ORACLES) == set(UNROUTED) == {fields["router_type"] for fields in LAYER_CASES.values()}
    assert {path.stem for path in FILES} == {f"{name}-{kind}" for name in LAYER_CASES for kind in ("train", "eval")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_vectors_are_what_the_layer_does(path: Path) -> None:
    name, _, kind = path.stem.rpartition("-")
    stored = json.loads(path.read_text(encoding="utf-8"))
    shape = Shape(length=4, train=kind == "train")
    case = make_case(name, LAYER_CASES[name], shape)
    found = ask_layer(case, info_of(LAYER_CASES[name], shape))
    np.testing.assert_allclose(found, np.array(stored["expected"]["answers"]), rtol=1e-9, atol=1e-11)
    # the file holds all of the question, and the oracle still answers it alike
    answers = LAYER_ORACLES[LAYER_CASES[name]["router_type"]](case)
    assert nearly(json.loads(json.dumps(layer_as_json(case, answers))), stored)


@pytest.mark.parametrize("name", LAYER_CASES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 7),
    samples=st.integers(1, 4),
    hidden=st.integers(2, 7),
    experts=st.sampled_from([4, 16]),
    train=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_random_questions_get_the_oracles_answer(
    name: str, length: int, samples: int, hidden: int, experts: int, train: bool, seed: int
) -> None:
    # a controller's blocks lie within an expert: with 16 of them its active cells would be too few
    shape = Shape(length, samples, hidden, 4 if "controller" in name else experts, train, seed)
    case = make_case(name, LAYER_CASES[name], shape)
    wanted = LAYER_ORACLES[LAYER_CASES[name]["router_type"]](case)
    found = ask_layer(case, info_of(LAYER_CASES[name], shape))
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["vanilla_memory", "vanilla_memory-seven", "product_keys-plain", "controller-still"])
@pytest.mark.parametrize("seed", range(12))
def test_equal_scores_are_told_apart_as_the_layer_says(name: str, seed: int) -> None:
    shape = Shape(5, 2, 3, 4, seed % 2 == 0, seed)
    case = make_case(name, LAYER_CASES[name], shape)
    # whole numbers: sums are exact, and many are equal
    whole = {key: np.round(value) for key, value in case.parameters.items()}
    case = replace(case, tokens=np.round(case.tokens), parameters=whole)
    wanted = LAYER_ORACLES[LAYER_CASES[name]["router_type"]](case)
    found = ask_layer(case, info_of(LAYER_CASES[name], shape))
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
