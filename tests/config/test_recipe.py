"""Recipes: strict keys, strict types, and messages that name file, table, key and value."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.recipe import check_tables, read_tables
from megatron_moe.config.run import RunConfig
from tests.config.example import DENSE, SPARSE, toml

WRONG = [
    # keys and tables
    ({"moe": {"topk": 2}}, "recipe.toml: [moe] has no option 'topk'; did you mean 'router_topk'?"),
    (
        {"moe": {"moe_router_topk": 2}},
        "recipe.toml: [moe] has no option 'moe_router_topk'; did you mean 'router_topk'?",
    ),
    ({"model": {"num-layers": 2}}, "recipe.toml: [model] has no option 'num-layers'; did you mean 'num_layers'?"),
    ({"model": {"num_experts": 2}}, "recipe.toml: [model] has no option 'num_experts'; it belongs under [moe]."),
    ({"model": {"lr_dekay_style": 2}}, "did you mean 'lr_decay_style', under [optimizer]?"),
    ({"moe": {"qqq": 1}}, "recipe.toml: [moe] has no option 'qqq'; --help lists them all."),
    ({"optimiser": {}}, "recipe.toml: there is no table [optimiser]; did you mean 'optimizer'?"),
    ({"hidden_size": 3}, "recipe.toml: 'hidden_size' stands outside a table; write it under [model]."),
    ({"zoom": 3}, "recipe.toml: 'zoom' is no table of options; the tables are model, moe, "),
    ({"moe": 3}, "recipe.toml: moe = 3: expected a table, [moe]."),
    ([1], "recipe.toml: expected tables of options, such as [model]."),
    # types
    ({"moe": {"num_experts": True}}, "recipe.toml: [moe] num_experts = true: expected an integer of at least 0."),
    ({"moe": {"num_experts": 2.0}}, "recipe.toml: [moe] num_experts = 2.0: expected an integer of at least 0."),
    ({"moe": {"num_experts": "8"}}, 'recipe.toml: [moe] num_experts = "8": expected an integer of at least 0.'),
    ({"moe": {"layer_freq": 2}}, 'recipe.toml: [moe] layer_freq = 2: expected a string in quotes, "2".'),
    ({"moe": {"router_pre_softmax": 1}}, "recipe.toml: [moe] router_pre_softmax = 1: expected true or false."),
    ({"moe": {"router_options": {"a": [1]}}}, "expected a table of name = value."),
    ({"moe": {"router_options": "a=1"}}, "expected a table of name = value."),
    ({"optimizer": {"lr": "fast"}}, 'recipe.toml: [optimizer] lr = "fast": expected a number above 0.'),
    ({"optimizer": {"lr": False}}, "recipe.toml: [optimizer] lr = false: expected a number above 0."),
    ({"optimizer": {"lr": float("nan")}}, "expected a number above 0."),
    ({"optimizer": {"lr": float("inf")}}, "expected a number above 0."),
    ({"optimizer": {"lr": 10**400}}, "000...: expected a number above 0."),
    ({"optimizer": {"adam_beta1": 1.0}}, "adam_beta1 = 1.0: expected a number of at least 0 and below 1."),
    ({"data": {"data_path": "corpus"}}, 'recipe.toml: [data] data_path = "corpus": expected a list of strings.'),
    ({"data": {"data_path": [["a"]]}}, "expected a list of strings."),
    ({"training": {"train_iters": 0}}, "train_iters = 0: expected an integer of at least 1, or none."),
    ({"model": {"num_layers": None}}, "num_layers = none: expected an integer of at least 1."),
    ({"model": {"activation": "swiglue"}}, "expected swiglu, geglu, geglu_tanh, gelu or relu; did you mean 'swiglu'?"),
    ({"precision": {"dtype": 16}}, "recipe.toml: [precision] dtype = 16: expected fp32, bf16 or fp64."),
]


@pytest.mark.parametrize(("tables", "message"), WRONG)
def test_what_a_recipe_may_not_say(tables: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_tables(tables, "recipe.toml")
    assert message in str(caught.value)


def test_values_become_what_their_fields_hold() -> None:
    values = check_tables(
        {
            "optimizer": {"lr": 1},
            "data": {"data_path": [0.5, "a", 2, "b"]},
            "moe": {"router_options": {"jitter": 0.01, "deep": True, "name": "x"}, "expert_capacity_factor": None},
        },
        "recipe.toml",
    )
    assert values == {
        "optimizer.lr": 1.0,
        "data.data_path": ("0.5", "a", "2", "b"),
        "moe.router_options": {"jitter": "0.01", "deep": "true", "name": "x"},
        "moe.expert_capacity_factor": None,
    }
    assert isinstance(values["optimizer.lr"], float)


def test_a_recipe_is_toml_with_a_table_of_router_options(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(toml(SPARSE) + "[moe.router_options]\njitter = 0.01\n")
    config = RunConfig.load(["--config", str(recipe)])
    assert config.moe.num_experts == 8
    assert config.moe.router_options == {"jitter": "0.01"}


def test_the_file_is_named_in_its_errors(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(toml(DENSE) + "[moe]\ntopk = 2\n")
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(["--config", str(recipe)])
    assert str(caught.value) == f"{recipe}: [moe] has no option 'topk'; did you mean 'router_topk'?"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"[model\n", "not valid TOML: "),
        ("a.toml", b"[model]\nnum_layers = 1\nnum_layers = 2\n", "not valid TOML: "),
        ("a.toml", b"[model]\nnum_layers = " + b"9" * 5000, "not valid TOML: "),
        ("a.json", b"{", "not valid JSON: "),
        ("a.json", b"[" * 100_000, "not valid JSON: "),
        ("a.toml", b"\xff\xfe", "not a text file in UTF-8"),
        ("a.yaml", b"model: {}", "expected a recipe, *.toml, or a saved configuration, *.json."),
    ],
)
def test_a_file_that_is_not_what_it_claims_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_tables(tmp_path / name)
    assert message in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"--config .*: .*give a file that can be read"):
        RunConfig.load(["--config", str(tmp_path / name)])


def test_a_saved_configuration_is_held_to_the_same_keys(tmp_path: Path) -> None:
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps({"moe": {"topk": 2}}))
    with pytest.raises(ConfigError, match="did you mean 'router_topk'"):
        RunConfig.load(["--config", str(saved)])
