"""From `--moe-router-options name=value ...` to the Options of one router."""

import dataclasses
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.hints import did_you_mean
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.options import Setting, settings_of
from megatron_moe.config.values import parse

_WORDS = {"none": None, "true": True, "false": False}


def parse_options(table: type, config: MoEConfig) -> Any:
    """A router's Options, filled from config.router_options; ConfigError says what is wrong and what would be right."""
    plain = [field.name for field in dataclasses.fields(table) if "option" not in field.metadata]
    if plain:
        raise ConfigError(
            f"{table.__name__}.{plain[0]} has no help text: declare it with option(default, help) of "
            f"megatron_moe/config/options.py."
        )
    known = settings_of(table)
    for name in config.router_options:
        if name not in known:
            hint = did_you_mean(name, known) or "."
            raise ConfigError(
                f"--moe-router-options {name}: the router {config.router_type} has no such option{hint} "
                f"It knows {', '.join(known) or 'none'}."
            )
    return table(**{name: _value(known[name], text) for name, text in config.router_options.items()})


def _value(setting: Setting, text: str) -> object:
    """The text as the type of its field."""
    word = text.strip().lower()
    # a string option may have a choice called "none"
    value = _WORDS[word] if word in _WORDS and setting.kind is not str else parse(setting.kind, text.strip())
    if not setting.accepts(value):
        raise ConfigError(f"--moe-router-options {setting.name}={text}: expected {setting.expected}.")
    return value
