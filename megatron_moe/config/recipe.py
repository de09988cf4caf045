"""Recipes in TOML and resolved configurations in JSON: tables of known options, each value of its type."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.hints import did_you_mean, nearest
from megatron_moe.config.options import Setting, settings_of
from megatron_moe.config.sections import section_types
from megatron_moe.config.values import brief, normalise, shortened

# of a recipe; a saved configuration has a few thousand
LIMIT_BYTES = 10_000_000


def read_tables(path: Path) -> object:
    """The tables of a .toml or .json file, as yet unchecked. ConfigError if it is not what its name says."""
    try:
        with path.open("rb") as file:
            content = file.read(LIMIT_BYTES + 1)
        if len(content) > LIMIT_BYTES:
            raise ConfigError(f"--config {path}: more than {LIMIT_BYTES:,} bytes, which no recipe has; look into it.")
        text = content.decode()
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}; give a file that can be read.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config {path}: not a text file in UTF-8; give a recipe or a saved configuration."
        ) from error
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    if path.suffix == ".json":
        return parse_json(text, str(path))
    raise ConfigError(f"--config {path}: expected a recipe, *.toml, or a saved configuration, *.json.")


def parse_json(text: str, source: str) -> object:
    """The tables of a saved configuration, as yet unchecked."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {error}.") from error


def check_tables(tables: object, source: str) -> dict[str, Any]:
    """The values of the options that the tables give, by key. ConfigError names source, table, key, value and hint."""
    if not isinstance(tables, Mapping):
        raise ConfigError(f"{source}: expected tables of options, such as [model].")
    values = {}
    for section, table in tables.items():
        if section not in section_types():
            raise ConfigError(_unknown_table(source, str(section), table))
        if not isinstance(table, Mapping):
            raise ConfigError(f"{source}: {section} = {brief(table)}: expected a table, [{section}].")
        known = settings_of(section_types()[section])
        for name, value in table.items():
            if name not in known:
                raise ConfigError(_unknown_key(source, section, str(name), known))
            values[f"{section}.{name}"] = _checked(source, section, known[name], value)
    return values


def _checked(source: str, section: str, setting: Setting, value: object) -> Any:
    """The value as its field holds it."""
    fitting = normalise(setting.kind, value)
    if not setting.accepts(fitting):
        hint = did_you_mean(value, setting.option.choices) if isinstance(value, str) else ""
        if setting.kind is str and isinstance(value, int | float) and not setting.option.choices:
            hint = f' in quotes, "{brief(value)}".'
        raise ConfigError(
            f"{source}: [{section}] {setting.name} = {brief(value)}: expected {setting.expected}{hint or '.'}"
        )
    return fitting


def _unknown_table(source: str, word: str, content: object) -> str:
    owners = [section for section, kind in section_types().items() if word in settings_of(kind)]
    word = shortened(word)
    if isinstance(content, Mapping):
        return f"{source}: there is no table [{word}]{did_you_mean(word, section_types()) or '.'}"
    if owners:
        return f"{source}: '{word}' stands outside a table; write it under [{owners[0]}]."
    return f"{source}: '{word}' is no table of options; the tables are {', '.join(section_types())}."


def _unknown_key(source: str, section: str, name: str, known: Mapping[str, Setting]) -> str:
    problem = f"{source}: [{section}] has no option '{shortened(name)}'"
    owners = [other for other, kind in section_types().items() if name in settings_of(kind)]
    if owners:
        return f"{problem}; it belongs under [{owners[0]}]."
    hint = did_you_mean(name, known)
    if hint:
        return problem + hint
    for other, kind in section_types().items():
        near = nearest(name, settings_of(kind))
        if near:
            return f"{problem}; did you mean '{near}', under [{other}]?"
    return f"{problem}; --help lists them all."
