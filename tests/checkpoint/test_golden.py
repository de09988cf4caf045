"""Checkpoints that earlier code saved keep loading: tests/golden/checkpoints/FORMAT/MODEL, with the numbers expected.

    PYTHONPATH=.:tests python tests/golden/write_checkpoints.py FORMAT

wrote them, with the code of their time. They stay as they are: whoever changes the format adds a folder of the new one.
"""

import json
from pathlib import Path

import pytest
from goals import Trials

from tests.checkpoint.golden import engine_of, losses
from tests.checkpoint.samples import newest

FOLDER = Path(__file__).parents[1] / "golden" / "checkpoints"
SAVED = sorted(path.parent for path in FOLDER.glob("*/*/expected.json"))
# float32 sums in other orders; bfloat16 keeps 8 bits
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


@pytest.mark.goal("R17", ci=1, nightly=1, what="a checkpoint of an earlier format: loads, same loss, trains further")
@pytest.mark.parametrize("place", SAVED, ids=lambda place: f"{place.parent.name}/{place.name}")
def test_a_checkpoint_of_an_earlier_format_gives_the_same_numbers(place: Path, trials: Trials) -> None:
    expected = json.loads((place / "expected.json").read_text())
    found = losses(place, expected)
    precision = json.loads(newest(place).config_json)["precision"]["dtype"]
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-6 if name == "loss" else TOLERANCE[precision]), name
    assert found["after"] < found["trained"]
    trials.add(1)


def test_all_kinds_of_models_are_among_them() -> None:
    assert {place.name for place in SAVED if place.parent.name == "v1"} == {"dense", "moe", "encoder_decoder"}


def test_a_router_goes_on_from_the_state_that_was_saved() -> None:
    (layer,) = [
        layer
        for stage in engine_of(newest(FOLDER / "v1" / "moe"), precise=False).stages
        for layer in stage.moe_layers().values()
    ]
    states = dict(layer.router.named_buffers())
    assert states and any(bool(state.any()) for state in states.values())
