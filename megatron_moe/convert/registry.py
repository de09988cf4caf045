"""The model families that can be converted, in the order in which `--model-type auto` tries them."""

from __future__ import annotations

from collections.abc import Mapping as TableMapping
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.convert.family import Family, ModelShape
from megatron_moe.convert.mixtral import Mixtral
from megatron_moe.convert.olmoe import Olmoe
from megatron_moe.convert.qwen3_moe import Qwen3Moe

FAMILIES: dict[str, Family] = {"mixtral": Mixtral(), "olmoe": Olmoe(), "qwen3_moe": Qwen3Moe()}
AUTO = "auto"


def family_for(shape: ModelShape, model_type: str) -> Family:
    """The family to export as; ConfigError tells everything that stands in the way."""
    if model_type != AUTO and model_type not in FAMILIES:
        raise ConfigError(f"--model-type {model_type}: expected {AUTO} or one of {', '.join(FAMILIES)}.")
    tried = FAMILIES if model_type == AUTO else {model_type: FAMILIES[model_type]}
    obstacles = {name: family.obstacles(shape) for name, family in tried.items()}
    fitting = [name for name, sentences in obstacles.items() if not sentences]
    if fitting:
        return FAMILIES[fitting[0]]
    if model_type == AUTO:
        shared = [one for one in next(iter(obstacles.values())) if all(one in others for others in obstacles.values())]
        told = "; ".join(shared) or "; ".join(f"as {name}: {sentences[0]}" for name, sentences in obstacles.items())
        raise ConfigError(f"no Hugging Face family can express this model: {told}.")
    raise ConfigError(f"{model_type} cannot express this model: {'; '.join(obstacles[model_type])}.")


def family_of(config: TableMapping[str, Any]) -> Family:
    """The family of a config.json; ConfigError if it is none that can be imported."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ConfigError(
            f"config.json: model_type is {model_type!r}, but only {', '.join(FAMILIES)} can be imported; "
            f"check that --hf-folder is the folder of such a model."
        )
    return family
