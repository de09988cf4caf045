"""Reading values out of a config.json, with errors that name the key, the value and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_moe.config.errors import ConfigError

Config = Mapping[str, Any]


def integer(config: Config, *keys: str, default: int | None = None) -> int:
    """A count under one of several names, which have to agree; null is as good as absent."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"config.json: {key} is {value!r}, expected a whole number of at least 1.")
    if len(set(found.values())) > 1:
        told = ", ".join(f"{key} {value}" for key, value in found.items())
        raise ConfigError(f"config.json contradicts itself ({told}); correct it to what the weights have.")
    if not found and default is None:
        raise ConfigError(f"config.json has no {' or '.join(keys)}; it is needed to know the shapes of the weights.")
    return int(next(iter(found.values()), default or 0))


def number(config: Config, key: str, *, default: float | None = None) -> float:
    """A coefficient; whole numbers count too."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config.json: {key} is {value!r}, expected a number.")
    return float(value)


def truth(config: Config, key: str, *, default: bool) -> bool:
    """true or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is {value!r}, expected true or false.")
    return value


def refuse_unless(config: Config, key: str, *allowed: object, why: str) -> None:
    """ConfigError if a key is there with a value that the project's model has nothing for."""
    if key in config and config[key] not in allowed:
        raise ConfigError(
            f"config.json: {key} is {config[key]!r}, {why}; only {' or '.join(map(repr, allowed))} can be imported."
        )


def rotary_base(config: Config, *, default: float) -> float:
    """The base of the rotary embedding, from the 4.x key, the 5.x table, or both; scaled positions are refused.

    `default` is what the library takes when neither is there.
    """
    for key in ("rope_scaling", "rope_parameters"):
        _refuse_scaling(config, key)
    table = config.get("rope_parameters") or {}
    bases = {
        name: number(where, "rope_theta")
        for name, where in (("rope_theta", config), ("rope_parameters.rope_theta", table))
        if where.get("rope_theta") is not None
    }
    if len(set(bases.values())) > 1:
        told = ", ".join(f"{name} {base:g}" for name, base in bases.items())
        raise ConfigError(
            f"config.json contradicts itself ({told}); correct it, for versions of the library would differ."
        )
    return next(iter(bases.values()), default)


def _refuse_scaling(config: Config, key: str) -> None:
    table = config.get(key)
    if table is None:
        return
    if not isinstance(table, Mapping):
        raise ConfigError(f"config.json: {key} is {table!r}, expected a table.")
    kind = table.get("rope_type", table.get("type", "default"))
    others = sorted(set(table) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    if kind != "default" or others or table.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"config.json: {key} is {dict(table)!r}; the project rotates whole heads without scaling the positions, so "
            f"only the type 'default' with a rope_theta can be imported."
        )
