"""A recipe's model made tiny: the sizes go down, every choice stays."""

import itertools
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.certify.certificate import Subject
from megatron_moe.certify.tiny_model import ENCODER_LENGTH, GLOBAL_BATCH, LENGTH, VOCAB
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.recipe import check_tables, read_tables
from megatron_moe.config.run import RunConfig
from megatron_moe.training.validate import validate

Tables = dict[str, dict[str, Any]]

SECTIONS = ("model", "moe", "encoder_moe")
LAYERS = 4  # of each stack: four pipeline stages want four
EXPERTS = (4, 8, 16, 32, 64, 128)  # tried in order


@dataclass(frozen=True)
class Shrunk:
    """A tiny model that makes a recipe's choices.   lines: what was changed, for people."""

    subject: Subject
    lines: tuple[str, ...]


def shrink(recipe: Path, more: Mapping[str, Any], dtype: str = "fp64") -> Shrunk:
    """The tiny model of a recipe.   more: further fields of [moe], which are taken as they are.

    Only [model], [moe] and [encoder_moe] count. Raises ConfigError when the recipe is not right, or when its way of
    routing takes none of the numbers of experts that are tried.
    """
    given = _tables(recipe)
    run = _model_alone(given)
    tables = {"model": _model(run, given["model"])}
    for section in SECTIONS[1:]:
        moe: MoEConfig = getattr(run, section)
        layers = run.model.num_layers if section == "moe" else run.model.encoder_num_layers
        tables[section] = _sparse(moe, given[section], layers) if moe.num_experts and layers else {"num_experts": 0}
    tables["moe"].update(more)
    subject = _with_experts(tables, dtype)
    tables = {"model": dict(subject.model), "moe": dict(subject.moe), "encoder_moe": dict(subject.encoder_moe or {})}
    return Shrunk(subject, tuple(_changes(run, tables)))


def _tables(recipe: Path) -> Tables:
    """What the recipe says of the model; a recipe need not be whole, for the rest may come by flags."""
    found: Tables = {section: {} for section in SECTIONS}
    for key, value in check_tables(read_tables(recipe), str(recipe)).items():
        section, _, name = key.partition(".")
        if section in found:
            found[section][name] = value
    return found


def _model_alone(given: Tables) -> RunConfig:
    """The recipe's model in a run of no data, on any number of steps."""
    groups = [int(given[section].get("routing_group_samples", 1)) for section in SECTIONS[1:]]
    samples = math.lcm(*groups)
    length = int(given["model"].get("max_position_embeddings", 512))
    given = {**given, "model": {"vocab_size": VOCAB, **given["model"]}}
    rest: Tables = {
        "data": {"seq_length": length},
        "training": {"global_batch_size": samples, "micro_batch_size": samples, "train_iters": 1},
        "optimizer": {"lr": 1.0},
    }
    return RunConfig.from_dict({**given, **rest})


def _model(run: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """[model]: as many query heads for a key-value head, a head as wide as its rotation needs."""
    model = run.model
    per_group = model.num_attention_heads // model.groups
    groups = min(model.groups, 4 if per_group == 1 else 2)
    width = next(size for size in (4, 8, 16, 32, 64) if _turns(size, model.rotary_percent))
    hidden = 16 if model.kv_channels is not None else groups * per_group * width
    tiny = {
        **given,
        "num_layers": LAYERS,
        "hidden_size": hidden,
        "num_attention_heads": groups * per_group,
        "num_query_groups": groups if model.num_query_groups is not None else None,
        "ffn_hidden_size": 24 if model.ffn_hidden_size is not None else None,
        "kv_channels": width if model.kv_channels is not None else None,
        "max_position_embeddings": None,
        "vocab_size": VOCAB,
        "make_vocab_size_divisible_by": 8,
    }
    if model.encoder_num_layers:
        tiny["encoder_num_layers"] = LAYERS
    if model.position_embedding_type == "relative":
        tiny |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
    return _without_none(tiny)


def _turns(width: int, share: float) -> bool:
    turned = int(width * share)
    return turned >= 2 and turned % 2 == 0


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if value is not None}


def _sparse(moe: MoEConfig, given: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """[moe] of a stack: the pattern of its layers stays, and what is wide becomes narrow."""
    tiny = {
        **given,
        "layer_freq": _pattern(moe, layers),
        "ffn_hidden_size": 12 if moe.ffn_hidden_size is not None else None,
        "routing_group_samples": min(moe.routing_group_samples, GLOBAL_BATCH // 2),
    }
    if moe.shared_expert_intermediate_size is not None:
        tiny["shared_expert_intermediate_size"] = 8
    if moe.min_capacity:
        # of a few tokens, more would hide the capacity factor
        tiny["min_capacity"] = 1
    return _without_none(tiny)


def _pattern(moe: MoEConfig, layers: int) -> str:
    """Four layers with both kinds, if there are both: the first four, or else one layer of each run of the pattern."""
    whole = moe.moe_layers(layers)
    runs = [kind for kind, _ in itertools.groupby(whole)]
    first = list(whole[:LAYERS])
    if len(first) < LAYERS or len(set(first)) < len(set(whole)):
        first = [*runs, *[runs[-1]] * LAYERS][:LAYERS]
    return ",".join(str(int(sparse)) for sparse in first)


def _with_experts(tables: Tables, dtype: str) -> Subject:
    """The fewest experts that the way of routing takes with all it was told."""
    problem = ConfigError("")
    for number in EXPERTS:
        found = {section: _numbered(tables[section], number) for section in SECTIONS[1:]}
        encoder = found["encoder_moe"] if "encoder_num_layers" in tables["model"] else None
        subject = Subject(found["moe"], tables["model"], encoder, dtype)
        try:
            validate(subject.config({}, 1))
        except ConfigError as error:
            problem = error
            continue
        return subject
    raise ConfigError(f"no tiny model of {EXPERTS[0]} to {EXPERTS[-1]} experts makes this recipe's choices: {problem}")


def _numbered(moe: Mapping[str, Any], number: int) -> dict[str, Any]:
    """At least two experts to choose among for each choice."""
    if moe.get("num_experts") == 0:
        return dict(moe)
    experts = max(number, 2 * int(moe.get("router_topk", 2)))
    return {**moe, "num_experts": experts}


def _changes(run: RunConfig, tables: Tables) -> list[str]:
    """One line for each option that the tiny model has otherwise."""
    encoder = f" and {ENCODER_LENGTH} of the encoder" if run.model.encoder_num_layers else ""
    lines = [f"{LENGTH} tokens{encoder} in a sample, {GLOBAL_BATCH} samples in a step"]
    for section, table in tables.items():
        for name, value in table.items():
            before: Any = getattr(getattr(run, section), name)
            if before != value and not (section != "model" and table.get("num_experts") == 0):
                lines.append(f"{section}.{name}: {_word(before)} -> {_word(value)}")
    return lines


def _word(value: Any) -> str:
    return "none" if value is None else textwrap.shorten(str(value).replace(",", " "), 24, placeholder=" ...")
