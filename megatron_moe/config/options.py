"""An option is a dataclass field that also knows its help, its flag and what values it takes.

Everything else (command line, TOML keys, checks, `explain`) is derived from these fields; nothing is written twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.values import Range, brief, conforms, describe

# The default of an option that somebody has to give.
REQUIRED: Any = dataclasses.MISSING


@dataclass(frozen=True, kw_only=True)
class Option:
    """What `option` says about a field beside its type and default."""

    help: str
    flag: str | None
    choices: tuple[str, ...]
    shortcuts: Mapping[str, str]
    const: str | None
    allowed: Range


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
    shortcuts: Mapping[str, str] | None = None,
    const: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its command-line option.

    default: a value, or REQUIRED.  flag: its spelling when it is not "--" + the section's prefix + the name.
    shortcuts: flags without a value, {"--bf16": "bf16"}.  const: the value of the bare flag.
    at_least, above, at_most, below: the range of a number.
    """
    allowed = Range(at_least=at_least, above=above, at_most=at_most, below=below)
    known = Option(help=help, flag=flag, choices=choices, shortcuts=dict(shortcuts or {}), const=const, allowed=allowed)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"option": known})
    return dataclasses.field(default=default, metadata={"option": known})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of one section, with type and flag worked out."""

    name: str
    flag: str
    kind: type  # int, float, bool, str, tuple (of str) or dict (str to str)
    optional: bool  # None is a value
    default: Any  # REQUIRED when there is none
    option: Option

    @property
    def expected(self) -> str:
        """What a right value is, in words: "an integer of at least 1"."""
        return describe(self.kind, self.optional, self.option.choices, self.option.allowed)

    @property
    def negative_flag(self) -> str:
        """The flag that says False: --no-x for --x, and --x for --no-x."""
        word = self.flag.removeprefix("--")
        return f"--{word.removeprefix('no-')}" if word.startswith("no-") else f"--no-{word}"

    def accepts(self, value: object) -> bool:
        """Whether the value has the type, is among the choices and lies in the range."""
        if value is None:
            return self.optional
        if not conforms(self.kind, value):
            return False
        if self.option.choices:
            return value in self.option.choices
        return not isinstance(value, int | float) or self.option.allowed.contains(value)


@cache
def settings_of(section: type) -> Mapping[str, Setting]:
    """The options of a section class by field name, in the order in which they are written."""
    hints = get_type_hints(section)
    prefix = section.__dict__.get("flag_prefix", "")
    return {f.name: _setting(f, hints[f.name], prefix) for f in dataclasses.fields(section)}


def _setting(field: dataclasses.Field[Any], hint: Any, prefix: str) -> Setting:
    known: Option = field.metadata["option"]
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = next(part for part in parts if part is not type(None))
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return Setting(
        name=field.name,
        flag=known.flag or f"--{prefix}{field.name.replace('_', '-')}",
        kind=get_origin(kind) or kind,
        optional=type(None) in parts,
        default=default,
        option=known,
    )


def check_values(section: Any) -> None:
    """Each value of a section by itself: ConfigError names the flag, the value and what was expected."""
    for setting in settings_of(section.__class__).values():
        value = getattr(section, setting.name)
        if not setting.accepts(value):
            raise ConfigError(f"{setting.flag} {brief(value)}: expected {setting.expected}.")
