"""Every option is of one class: it must be as it was, or it may change and that is told, or it is of no run."""

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from goals import Trials

from megatron_moe.checkpoint.load import CheckpointReader
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import Setting
from megatron_moe.config.run import RunConfig
from megatron_moe.config.sections import all_settings
from megatron_moe.training.resume import check_same_run
from tests.end_to_end.tiny_job import job

# what makes the model's function, or the order of samples; in each stack of experts as well
FIXED = {
    "model": "num_layers encoder_num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups "
    "kv_channels position_embedding_type relative_attention_num_buckets relative_attention_max_distance rotary_base "
    "rotary_percent "
    "normalization norm_epsilon activation qk_layernorm untie_embeddings_and_output_weights",
    "moe": "num_experts layer_freq ffn_hidden_size router_type router_topk router_pre_softmax router_options "
    "shared_expert_intermediate_size shared_expert_gate routing_group_samples activation expert_bias extra_ffn",
    "data": "seq_length objective split data_path noise_density mean_noise_span_length vocab_extra_ids",
    "training": "seed",
}
# where files are, how often they are written
OF_NO_RUN = ("checkpoint", "logging")
# values that the rule below does not find
VALUES: dict[str, Any] = {
    "data.split": "50,50,0",
    "data.data_path": ("1", "a", "3", "b"),
    "moe.layer_freq": "1",
    "encoder_moe.layer_freq": "2",
    "moe.router_type": "switch",
    "moe.router_options": {"route_scale": "1.5"},
    "moe.activation": "relu",
    "optimizer.optimizer": "another",
    "model.kv_channels": 8,
    "model.ffn_hidden_size": 32,
}


def expected_class(key: str) -> str:
    section, _, name = key.partition(".")
    if section in OF_NO_RUN:
        return "of no run"
    return "fixed" if name in FIXED.get("moe" if section == "encoder_moe" else section, "").split() else "free"


def another(setting: Setting, value: Any) -> Any:
    """Another value of the option's type; whether it goes with the others does not matter here."""
    if setting.option.choices:
        return next((choice for choice in setting.option.choices if choice != value), "another")
    if setting.kind is bool:
        return not value
    if setting.kind in (int, float):
        return setting.kind(value * 2 + 1 if value else 3)
    return {"x": "y"} if setting.kind is dict else ("x",) if setting.kind is tuple else f"{value}x"


@cache
def run() -> RunConfig:
    """A run in which every option counts."""
    return job(
        Path("tokens"),
        model={"encoder_num_layers": 2, "vocab_size": 161},
        moe={"router_type": "deepseek_v3", "router_topk": 2, "aux_loss_coeff": 0.0},
        encoder_moe={"num_experts": 4, "router_type": "deepseek_v3"},
        data={"objective": "span_corruption", "seq_length": 24},
    )


def with_another(key: str) -> RunConfig:
    section, _, name = key.partition(".")
    changed = copy.deepcopy(run())
    table = getattr(changed, section)
    before = getattr(table, name)
    value = VALUES.get(key, VALUES.get(key.removeprefix("encoder_"))) or another(all_settings()[key], before)
    assert value != before
    # past all rules: one option at a time would often be refused for another reason
    object.__setattr__(table, name, value)
    return changed


@cache
def saved() -> CheckpointReader:
    """As much of a checkpoint as the check reads."""
    return cast(CheckpointReader, SimpleNamespace(folder=Path("saved"), config_json=run().to_json()))


def found_class(key: str) -> str:
    flag = all_settings()[key].flag
    try:
        told = check_same_run(saved(), with_another(key))
    except ConfigError as error:
        assert f"{flag} was " in str(error), error
        return "fixed"
    assert all(line.startswith(f"{flag} was ") for line in told), told
    return "free" if told else "of no run"


@pytest.mark.goal("R16", ci=150, nightly=150, what="every option changed at resume: refused, told, or of no run")
def test_every_option_is_of_one_class(trials: Trials) -> None:
    wrong = {}
    for key in all_settings():
        found = found_class(key)
        if found != expected_class(key):
            wrong[key] = found
        trials.add(1)
    assert wrong == {}
    assert check_same_run(saved(), run()) == []
