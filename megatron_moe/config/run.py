"""One run, wholly described: defaults <- recipe or saved configuration <- flags, checked once, as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.fallback import check_fallbacks
from megatron_moe.config.flags import parse_flags
from megatron_moe.config.no_effect import refuse_no_effect
from megatron_moe.config.options import REQUIRED, settings_of
from megatron_moe.config.recipe import check_tables, parse_json, read_tables
from megatron_moe.config.relations import check_relations
from megatron_moe.config.sections import Sections, all_settings, section_types
from megatron_moe.config.values import written


@dataclass(frozen=True, kw_only=True)
class RunConfig(Sections):
    """What a run is. Made by `load`, `from_dict` or `from_json`; every relation between sections holds.

    origins: for each option not at its default by silence, "recipe", "flag", "checkpoint" or "fallback", by its key.
    """

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_relations(self)
        refuse_no_effect(self, self.origins)
        check_fallbacks(self, self.origins)

    @classmethod
    def load(cls, argv: Sequence[str], *, prog: str | None = None) -> Self:
        """The run that a command line describes (without the program's name). ConfigError says what is wrong with it.

        `--help` prints the options and raises SystemExit(0). No ConfigError is printed here: main programs do that.
        """
        flags = parse_flags(argv, prog)
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        if flags.config is not None:
            values = check_tables(read_tables(flags.config), str(flags.config))
            saved = flags.config.suffix == ".json"
            origins = _saved_origins(values) if saved else dict.fromkeys(values, "recipe")
        for key, value in flags.values.items():
            adds = isinstance(value, dict) and key not in flags.cleared
            values[key] = {**values.get(key, {}), **value} if adds else value
            origins[key] = "flag"
        return cls._build(values, origins)

    @classmethod
    def from_dict(cls, tables: Mapping[str, Mapping[str, Any]], *, origin: str = "recipe") -> Self:
        """The run that nested dicts describe, {"model": {"num_layers": 2, ...}, ...}, as strict as a recipe."""
        values = check_tables(tables, origin)
        return cls._build(values, dict.fromkeys(values, origin))

    @classmethod
    def from_json(cls, text: str, *, source: str = "saved configuration") -> Self:
        """The run that `to_json` wrote. What differs from its default has the origin "checkpoint"."""
        values = check_tables(parse_json(text, source), source)
        return cls._build(values, _saved_origins(values))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Every value, by section and name; only types that JSON has."""
        return {
            section: {name: _plain(getattr(getattr(self, section), name)) for name in settings_of(section_type)}
            for section, section_type in section_types().items()
        }

    def to_json(self) -> str:
        """The resolved configuration as text, one option a line; `from_json` and `--config` read it back."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def origin(self, key: str) -> str:
        """Who set an option such as "moe.router_topk": "default", "recipe", "flag" or "checkpoint"."""
        if key not in all_settings():
            raise KeyError(key)
        return self.origins.get(key, "default")

    def explain(self) -> str:
        """Every value with its origin, a line each, aligned, under its section."""
        rows = []
        for section, section_type in section_types().items():
            for name in settings_of(section_type):
                value = getattr(getattr(self, section), name)
                rows.append((section, name, written(value), self.origin(f"{section}.{name}")))
        wide = max(len(name) for _, name, _, _ in rows)
        # Values longer than this stick out alone, not with the whole column.
        value_wide = min(32, max(len(value) for _, _, value, _ in rows))
        lines: list[str] = []
        for section, name, value, origin in rows:
            if f"[{section}]" not in lines:
                lines.append(f"[{section}]")
            lines.append(f"  {name:<{wide}}  {value:<{value_wide}}  {origin}")
        return "\n".join(lines)

    @classmethod
    def _build(cls, values: Mapping[str, Any], origins: Mapping[str, str]) -> Self:
        """The sections from values by key; ConfigError lists every required option that is absent."""
        missing = [s.flag for key, s in all_settings().items() if s.default is REQUIRED and key not in values]
        if missing:
            listed = missing[0] if len(missing) == 1 else f"{', '.join(missing[:-1])} and {missing[-1]}"
            verb = "is" if len(missing) == 1 else "are"
            raise ConfigError(
                f"{listed} {verb} required; give them as flags, or in a recipe with --config recipe.toml."
            )
        sections = {
            section: section_type(
                **{
                    name: values[f"{section}.{name}"]
                    for name in settings_of(section_type)
                    if f"{section}.{name}" in values
                }
            )
            for section, section_type in section_types().items()
        }
        return cls(**sections, origins=dict(origins))


def _saved_origins(values: Mapping[str, Any]) -> dict[str, str]:
    """A saved configuration holds every value; those at their default were most likely set by nobody."""
    return {key: "checkpoint" for key, value in values.items() if value != all_settings()[key].default}


def _plain(value: Any) -> Any:
    """A value in the types of JSON."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
