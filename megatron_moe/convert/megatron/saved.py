"""Reading single settings of Megatron's saved `args`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_moe.config.errors import ConfigError


class Saved:
    """Settings by name; ConfigError names one that is missing or of another kind. A setting of None counts as unset."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments

    def __contains__(self, name: str) -> bool:
        return self._arguments.get(name) is not None

    def get(self, name: str) -> Any:
        """As it is; None where it is not there."""
        return self._arguments.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        """A count."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"args.{name} is {value!r}, expected a whole number.")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A coefficient; whole numbers count too."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"args.{name} is {value!r}, expected a number.")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        """A word."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise ConfigError(f"args.{name} is {value!r}, expected a word.")
        return value

    def truth(self, name: str) -> bool:
        """False where it is not there."""
        value = self._value(name, False)
        if not isinstance(value, bool):
            raise ConfigError(f"args.{name} is {value!r}, expected true or false.")
        return value

    def must_be(self, name: str, allowed: tuple[Any, ...], why: str) -> None:
        """ConfigError, with the reason, if the setting is there and is none of `allowed`."""
        value = self._arguments.get(name)
        if value is None or any(type(one) is type(value) and one == value for one in allowed):
            return
        if isinstance(value, float) and value in allowed:
            return
        wanted = " or ".join(repr(one) for one in allowed)
        raise ConfigError(f"args.{name} is {value!r}: {why}; only {wanted} can be imported.")

    def _value(self, name: str, default: Any) -> Any:
        value = self._arguments.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"the checkpoint's args have no {name}; it is needed to know the model.")
        return value
