"""The command line, derived from the sections: one group of `--help` for each, in Megatron's spelling."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.hints import MEGATRON_FLAGS, did_you_mean
from megatron_moe.config.options import REQUIRED, Setting, settings_of
from megatron_moe.config.sections import all_settings, section_types
from megatron_moe.config.values import normalise, pairs, parse, written

METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", tuple: "TEXT", dict: "NAME=VALUE"}
EPILOG = (
    "Values come from the defaults, then from --config, then from the flags. 'none' unsets an option that may be none "
    "(a directory of that name is ./none). A recipe is TOML: one table for each group above, keys as the flags are "
    "named after the group's prefix, with underscores: --moe-router-topk is router_topk under [moe]."
)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What a command line says: a file, values by key, and the tables that are emptied before values are added."""

    config: Path | None
    values: dict[str, Any]
    cleared: frozenset[str]


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ConfigError, not an exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see --help.")


class _Switch(argparse.Action):
    """--x is True and --no-x is False (the other way round for an option that is called no_x)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def parse_flags(arguments: Sequence[str], prog: str | None = None) -> Flags:
    """Read a command line. ConfigError names the flag and what was expected; `--help` prints and exits with 0."""
    namespace, rest = build_parser(prog).parse_known_args(list(arguments))
    if rest:
        raise ConfigError(_unknown(rest))
    given = vars(namespace)
    configs = given.pop("config", [])
    if len(configs) > 1:
        raise ConfigError(f"--config was given {len(configs)} times; give one file, and the rest as flags.")
    values: dict[str, Any] = {}
    cleared = set()
    for key, raw in given.items():
        setting = all_settings()[key]
        if setting.kind is dict:
            values[key] = _table(setting, raw)
            if [] in raw:
                cleared.add(key)
        else:
            values[key] = _value(setting, raw)
    return Flags(config=Path(configs[0]) if configs else None, values=values, cleared=frozenset(cleared))


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """A parser of every option; only what is given ends up in its namespace, under keys such as "moe.router_topk"."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--option value ...]",
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="a recipe (.toml), or the configuration saved by a run (.json)",
    )
    for section, section_type in section_types().items():
        group = parser.add_argument_group(section, _summary(section_type))
        for setting in settings_of(section_type).values():
            _add(group, f"{section}.{setting.name}", setting)
    return parser


def _add(group: argparse._ArgumentGroup, key: str, setting: Setting) -> None:
    """One option, and its shortcuts."""
    known, about = setting.option, _help(setting)
    if setting.kind is bool:
        group.add_argument(setting.flag, setting.negative_flag, action=_Switch, nargs=0, dest=key, help=about)
        return
    metavar = f"{{{','.join(known.choices)}}}" if known.choices else METAVARS[setting.kind]
    if setting.kind is dict:
        group.add_argument(setting.flag, dest=key, action="append", nargs="*", metavar=metavar, help=about)
    elif setting.kind is tuple:
        group.add_argument(setting.flag, dest=key, nargs="*", metavar=metavar, help=about)
    elif known.const is not None:
        group.add_argument(setting.flag, dest=key, nargs="?", const=known.const, metavar=metavar, help=about)
    else:
        group.add_argument(setting.flag, dest=key, metavar=metavar, help=about)
    for flag, value in known.shortcuts.items():
        group.add_argument(
            flag, dest=key, action="store_const", const=value, help=f"the same as {setting.flag} {value}"
        )


def _summary(section_type: type) -> str:
    return (section_type.__doc__ or "").strip().partition("\n")[0]


def _help(setting: Setting) -> str:
    default = setting.default
    if default is REQUIRED:
        ending = " (required)"
    elif default is None or default in ((), {}):
        ending = ""
    else:
        ending = f" (default {default if isinstance(default, str) else written(default)})"
    return (setting.option.help + ending).replace("%", "%%")


def _value(setting: Setting, raw: Any) -> Any:
    """The text of a flag as its field holds it."""
    if isinstance(raw, bool):
        return raw
    if setting.optional and raw.lower() == "none":
        return None
    value = normalise(setting.kind, parse(setting.kind, raw))
    if not setting.accepts(value):
        hint = did_you_mean(raw, setting.option.choices) if setting.option.choices else ""
        raise ConfigError(f"{setting.flag} {raw}: expected {setting.expected}{hint or '.'}")
    return value


def _table(setting: Setting, occurrences: list[list[str]]) -> dict[str, str]:
    """name=value words of all occurrences of a flag; one without any words forgets those before it."""
    table: dict[str, str] = {}
    for words in occurrences:
        found, wrong = pairs(words)
        if wrong is not None:
            raise ConfigError(f"{setting.flag} {wrong}: expected name=value, such as jitter=0.1.")
        table = {**table, **found} if words else {}
    return table


def _unknown(words: Sequence[str]) -> str:
    """One sentence for the first word that no option took, or for all flags that do not exist."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]
    if not flags:
        return f"'{words[0]}' belongs to no option; options begin with -- and take as many values as --help says."
    return " ".join(_unknown_flag(flag) for flag in dict.fromkeys(flags))


def _unknown_flag(flag: str) -> str:
    if flag in MEGATRON_FLAGS:
        return f"there is no option {flag}: {MEGATRON_FLAGS[flag]}."
    names = ["--config"]
    for setting in all_settings().values():
        names += [setting.flag, *setting.option.shortcuts]
        if setting.kind is bool:
            names.append(setting.negative_flag)
    return f"there is no option {flag}{did_you_mean(flag, names) or '; --help lists them all.'}"
