"""One run: defaults <- recipe <- flags, each value with its origin, and back from JSON as it was."""

import copy
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.sections import all_settings
from tests.config.example import DENSE_FLAGS, SPARSE, dense, sparse, toml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(toml({**SPARSE, "moe.router_topk": 4}) + '[moe.router_options]\njitter = 0.1\nnoise = "on"\n')
    return str(path)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(recipe: str) -> None:
    assert RunConfig.load(["--config", recipe]).moe.router_topk == 4
    config = RunConfig.load(["--moe-router-topk", "1", "--config", recipe])
    assert (config.moe.router_topk, config.moe.num_experts, config.moe.min_capacity) == (1, 8, 0)
    assert config.origin("moe.router_topk") == "flag"
    assert config.origin("moe.num_experts") == "recipe"
    assert config.origin("moe.min_capacity") == "default"


def test_a_flag_can_unset_what_the_recipe_sets(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(toml({**SPARSE, "moe.expert_capacity_factor": 1.25}))
    config = RunConfig.load(["--config", str(path), "--moe-expert-capacity-factor", "none"])
    assert config.moe.expert_capacity_factor is None


def test_router_options_add_to_the_recipes_unless_cleared(recipe: str) -> None:
    add = ["--config", recipe, "--moe-router-options", "jitter=0.2", "k=1"]
    assert RunConfig.load(add).moe.router_options == {"jitter": "0.2", "noise": "on", "k": "1"}
    clear = ["--config", recipe, "--moe-router-options", "--moe-router-options", "k=1"]
    assert RunConfig.load(clear).moe.router_options == {"k": "1"}


def test_required_options_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load([])
    assert str(caught.value) == (
        "--num-layers, --hidden-size, --num-attention-heads, --seq-length, --global-batch-size and --lr are required; "
        "give them as flags, or in a recipe with --config recipe.toml."
    )
    with pytest.raises(ConfigError, match=r"^--lr is required"):
        dense({"optimizer.lr": "unset"})


def test_json_gives_the_same_run_back() -> None:
    config = sparse(
        {
            "data.data_path": ["0.5", "a", "0.5", "ü/b"],
            "moe.router_options": {"jitter": 0.1},
            "moe.expert_capacity_factor": 1.25,
            "optimizer.lr": 3e-4,
            "parallel.sequence_parallel": False,
        }
    )
    again = RunConfig.from_json(config.to_json())
    assert again == config
    assert again.to_json() == config.to_json()
    assert json.loads(config.to_json()) == config.to_dict()
    assert again.origin("moe.expert_capacity_factor") == "checkpoint"
    assert again.origin("model.activation") == "default"


def test_a_saved_configuration_is_accepted_back_and_flags_win_over_it(tmp_path: Path) -> None:
    saved = tmp_path / "config.json"
    saved.write_text(dense({"training.seed": 5}).to_json())
    config = RunConfig.load(["--config", str(saved), "--train-iters", "7"])
    assert (config.training.seed, config.training.train_iters) == (5, 7)
    assert config.origin("training.seed") == "checkpoint"
    assert config.origin("training.train_iters") == "flag"


def test_the_saved_form_holds_every_option_in_order() -> None:
    saved = dense().to_dict()
    assert [f"{section}.{name}" for section, table in saved.items() for name in table] == list(all_settings())


def test_flags_and_nested_dicts_describe_the_same_run() -> None:
    assert RunConfig.load(DENSE_FLAGS) == dense()


def test_explain_shows_every_value_with_its_origin_aligned() -> None:
    text = RunConfig.load([*DENSE_FLAGS, "--bf16"]).explain()
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("[")] == [
        *(
            "[model]",
            "[moe]",
            "[encoder_moe]",
            "[parallel]",
            "[precision]",
            "[data]",
            "[training]",
            "[optimizer]",
            "[checkpoint]",
            "[logging]",
        )
    ]
    values = [line for line in lines if line.startswith("  ")]
    assert len(values) == len(all_settings())
    assert len({line.index(line.split()[1]) for line in values}) == 1
    assert len({len(line) - len(line.split()[-1]) for line in values}) == 1
    assert any(line.split() == ["dtype", '"bf16"', "flag"] for line in values)
    assert any(line.split() == ["clip_grad", "1.0", "default"] for line in values)


def test_origin_of_an_option_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError):
        dense().origin("moe.topk")


def test_a_run_is_frozen_and_a_changed_copy_is_checked_again() -> None:
    config = sparse()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = config.model  # type: ignore[misc]
    wider = dataclasses.replace(config.parallel, expert_model_parallel_size=3)
    with pytest.raises(ConfigError, match="--num-experts 8 cannot be split"):
        dataclasses.replace(config, parallel=wider)
    assert copy.deepcopy(config) == config


REFUSED_UNDER_O = """
import sys
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.world import check_world
base = sys.argv[1:]
assert False, "python -O is off"
def said(words, world=1):
    try:
        check_world(RunConfig.load([*base, *words]), world)
    except ConfigError as error:
        print(error.exit_code, error)
said(["--topk", "2"])
said(["--moe-router-topk", "0"])
said(["--moe-router-topk", "2"])
said(["--num-experts", "6", "--expert-model-parallel-size", "4"])
said(["--tensor-model-parallel-size", "2"], world=3)
said([])
"""


def test_nothing_is_let_through_under_python_o() -> None:
    command = [sys.executable, "-O", "-c", REFUSED_UNDER_O, *DENSE_FLAGS]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    starts = [
        "2 there is no option --topk; did you mean '--moe-router-topk'?",
        "2 --moe-router-topk 0: expected an integer of at least 1.",
        "2 --moe-router-topk 2 (from the flag) has no effect with --num-experts 0 (a dense model);",
        "2 --num-experts 6 cannot be split over --expert-model-parallel-size 4;",
        "2 3 ranks cannot be shared out over --tensor-model-parallel-size 2",
    ]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_the_room_stands_on_the_standard_library_alone() -> None:
    code = (
        "import sys; import megatron_moe.config.run, megatron_moe.config.world;"
        "own = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names);"
        "print(sorted(name for name in own if not name.startswith(('_', 'sitecustomize', 'usercustomize'))))"
    )
    command = [sys.executable, "-S", "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['megatron_moe']"


def test_a_command_line_is_parsed_in_a_blink(recipe: str) -> None:
    RunConfig.load(["--config", recipe])
    times = []
    for _ in range(5):
        start = time.perf_counter()
        RunConfig.load(["--config", recipe, "--bf16", "--moe-router-topk", "1"])
        times.append(time.perf_counter() - start)
    # seconds; the best of five, so that a busy machine does not matter; about 0.005 measured
    assert min(times) < 0.08
