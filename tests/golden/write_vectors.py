"""Writes tests/golden/routers/*.json from the oracles: inputs, plan, weights and losses of every router.

And tests/golden/layers/*.json: inputs and answers of every layer that assigns nothing.

    PYTHONPATH=.:tests python tests/golden/write_vectors.py

The code under test only says which parameters a router has. Others may hold their own code to these files.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from oracles.case import Case, Expected
from oracles.cases import Shape, make_case
from oracles.layers import LAYER_CASES, LAYER_ORACLES
from oracles.registry import CASES, ORACLES

FOLDER = Path(__file__).parent / "routers"
LAYER_FOLDER = Path(__file__).parent / "layers"
REPOSITORY = Path(__file__).parents[2]


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def as_json(case: Case, expected: Expected) -> dict[str, Any]:
    """Pairs are sorted by token, then expert."""
    return {
        **question(case),
        "expected": {
            "assignments": [[*pair, weight] for pair, weight in sorted(expected.pairs.items())],
            "losses": {name: list(loss) for name, loss in expected.losses.items()},
        },
    }


def layer_as_json(case: Case, answers: np.ndarray) -> dict[str, Any]:
    return {**question(case), "expected": {"answers": plain(answers)}}


def question(case: Case) -> dict[str, Any]:
    """All that a decision depends on."""
    return {
        # files stand at their place in the repository
        "moe": json.loads(json.dumps(dict(case.fields)).replace(f"{REPOSITORY}/", "")),
        "train": case.train,
        "seed": case.seed,
        "step": case.step,
        "layer": case.layer,
        "vocab_size": case.vocab_size,
        "num_groups": case.num_groups,
        "tokens": plain(case.tokens),
        "expert_keys": plain(case.expert_keys),
        "parameters": {name: plain(value) for name, value in case.parameters.items()},
        "state": {name: plain(np.asarray(value)) for name, value in case.state.items()},
        "info": {name: plain(value) for name, value in case.info.items()},
    }


def vectors() -> dict[str, dict[str, Any]]:
    """All files by name."""
    found = {}
    for name, fields in CASES.items():
        for train in (True, False):
            case = make_case(name, fields, Shape(train=train))
            oracle = ORACLES[fields["router_type"]]
            found[f"{name}-{'train' if train else 'eval'}"] = as_json(case, oracle(case))
    return found


def layer_vectors() -> dict[str, dict[str, Any]]:
    """Those of layers that assign nothing."""
    found = {}
    for name, fields in LAYER_CASES.items():
        for train in (True, False):
            case = make_case(name, fields, Shape(length=4, train=train))
            answers = LAYER_ORACLES[fields["router_type"]](case)
            found[f"{name}-{'train' if train else 'eval'}"] = layer_as_json(case, answers)
    return found


def main() -> None:
    for folder, contents in ((FOLDER, vectors()), (LAYER_FOLDER, layer_vectors())):
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
