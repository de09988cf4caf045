"""Values on their way in: from the text of a flag, from TOML or JSON, to the type that a field declares."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KIND_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple: "a list of strings",
    dict: "a table of name = value",
}


@dataclass(frozen=True, kw_only=True)
class Range:
    """The interval in which a number has to lie; None = open on that side."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def contains(self, value: float) -> bool:
        """Whether the number lies in the interval."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def words(self) -> str:
        """ "of at least 1", "above 0 and at most 1", or nothing."""
        limits = (
            ("of at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)


def describe(kind: type, optional: bool, choices: Sequence[str], allowed: Range) -> str:
    """What a right value is, in words."""
    if choices:
        words = choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
    else:
        words = f"{KIND_WORDS[kind]} {allowed.words()}".strip()
    return f"{words}, or none" if optional else words


def conforms(kind: type, value: object) -> bool:
    """Whether a value has the type of its field. A bool is no integer here, and NaN and infinity are no numbers."""
    if kind is str:
        return _is_text(value)
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is tuple:
        return isinstance(value, tuple) and all(_is_text(item) for item in value)
    return isinstance(value, dict) and all(_is_text(item) for pair in value.items() for item in pair)


def _is_text(value: object) -> bool:
    """A string that a file's name and a log can hold: without NUL, in UTF-8.

    JSON can write half characters, and stray bytes of a command line become some: a saved configuration holds neither.
    """
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def normalise(kind: type, value: object) -> object:
    """A TOML or JSON value as its field holds it; what does not fit is returned as it is, for `conforms` to refuse."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return _as_float(value)
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_as_text(item) for item in value)
    if kind is dict and isinstance(value, Mapping):
        return {name: _as_text(item) for name, item in value.items()}
    return value


def parse(kind: type, text: str) -> object:
    """The text after a flag as int, float or str; text that is no such number is returned as it is."""
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        return text


def pairs(words: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """`key=value` words as a dict, and the first word that is none."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            return found, word
        found[name] = value
    return found, None


def written(value: Any) -> str:
    """A value as a person writes it: none, true, 0.5, "text" quoted, a list in brackets."""
    if value is None:
        return "none"
    return json.dumps(value, default=str, ensure_ascii=False)


def brief(value: Any) -> str:
    """A value as written, cut where it would drown an error message."""
    return shortened(written(value))


def shortened(text: str) -> str:
    """A word from a file as an error message can hold it: of bounded length, half characters spelt out."""
    printable = text[:81].encode(errors="backslashreplace").decode()
    return printable if len(text) <= 80 else f"{printable[:77]}..."


def _as_text(value: object) -> object:
    """Numbers and booleans in a list or table as text; anything nested stays as it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _as_float(value: int) -> float:
    """An integer as float; infinity when it is too large, which no field accepts."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
