"""An option is written once: default, type, flag, range and check follow from the field."""

from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import REQUIRED, check_values, option, settings_of
from megatron_moe.config.sections import all_settings, section_types


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A section of its own."""

    flag_prefix: ClassVar[str] = "toy-"

    count: int = option(REQUIRED, "how many", at_least=1, at_most=9)
    share: float | None = option(None, "how much", above=0, below=1)
    kind: str = option("plain", "which", flag="--kind", choices=("plain", "fancy"))
    no_fun: bool = option(False, "without")
    names: tuple[str, ...] = option((), "who")
    extra: dict[str, str] = option({}, "what else")

    def __post_init__(self) -> None:
        check_values(self)


def test_flags_and_types_follow_from_the_fields() -> None:
    settings = settings_of(Toy)
    assert {name: (s.flag, s.kind, s.optional) for name, s in settings.items()} == {
        "count": ("--toy-count", int, False),
        "share": ("--toy-share", float, True),
        "kind": ("--kind", str, False),
        "no_fun": ("--toy-no-fun", bool, False),
        "names": ("--toy-names", tuple, False),
        "extra": ("--toy-extra", dict, False),
    }
    assert settings["count"].default is REQUIRED
    assert settings["count"].expected == "an integer of at least 1 and at most 9"
    assert settings["share"].expected == "a number above 0 and below 1, or none"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "--toy-count 0: expected an integer of at least 1 and at most 9."),
        ({"count": 10}, "--toy-count 10: "),
        ({"count": True}, "--toy-count true: "),
        ({"count": 1.0}, "--toy-count 1.0: "),
        ({"count": None}, "--toy-count none: "),
        ({"share": 0.0}, "--toy-share 0.0: expected a number above 0 and below 1, or none."),
        ({"share": 1.0}, "--toy-share 1.0: "),
        ({"share": float("nan")}, "--toy-share NaN: "),
        ({"kind": "grand"}, '--kind "grand": expected plain or fancy.'),
        ({"no_fun": 1}, "--toy-no-fun 1: expected true or false."),
        ({"names": ["a"]}, '--toy-names ["a"]: expected a list of strings.'),
        ({"names": (1,)}, "--toy-names [1]: "),
        ({"extra": {"a": 1}}, '--toy-extra {"a": 1}: expected a table of name = value.'),
    ],
)
def test_a_section_checks_its_own_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Toy(**{"count": 1, **values})
    assert str(caught.value).startswith(message)


def test_a_right_section_is_frozen_and_shares_no_table_with_another() -> None:
    toy, other = Toy(count=9, share=0.5), Toy(count=1)
    assert toy.extra == {} and toy.extra is not other.extra
    with pytest.raises(FrozenInstanceError):
        toy.count = 2  # type: ignore[misc]


def test_no_two_options_share_a_flag() -> None:
    flags = [flag for s in all_settings().values() for flag in (s.flag, *s.option.shortcuts)]
    flags += [s.negative_flag for s in all_settings().values() if s.kind is bool]
    assert len(flags) == len(set(flags))


def test_every_default_is_a_value_that_its_option_accepts() -> None:
    for setting in all_settings().values():
        assert setting.default is REQUIRED or setting.accepts(setting.default), setting.flag
        assert all(setting.accepts(value) for value in setting.option.shortcuts.values())
        assert setting.option.const is None or setting.accepts(setting.option.const)


def test_sections_are_in_the_order_of_the_house() -> None:
    assert (
        " ".join(section_types())
        == "model moe encoder_moe parallel precision data training optimizer checkpoint logging"
    )
