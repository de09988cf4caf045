"""Whatever stands in a recipe or a saved configuration: a run or a ConfigError, in bounded time and memory."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config import recipe
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.sections import all_settings
from tests.config.example import DENSE_FLAGS, SPARSE, tables

ODD = st.sampled_from(["\0", "\ud800", "9" * 50, "-1", "nan"])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), ODD)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
KEYS = sorted(all_settings())


def outcome(load: Any) -> str:
    """ "run" or "refused"; any other exception is a failure."""
    try:
        load()
    except ConfigError as error:
        assert len(str(error)) < 2000
        str(error).encode()
        return "refused"
    return "run"


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_for_any_option_is_taken_or_refused(key: str, value: object) -> None:
    section, _, name = key.partition(".")
    changed = tables(SPARSE)
    changed.setdefault(section, {})[name] = value
    outcome(lambda: RunConfig.from_dict(changed))
    outcome(lambda: RunConfig.from_json(json.dumps(changed)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(found=VALUES | st.dictionaries(st.sampled_from(["model", "moe", "data", "x"]), VALUES, max_size=3))
def test_any_json_in_place_of_the_tables_is_refused(found: object) -> None:
    assert outcome(lambda: RunConfig.from_json(json.dumps(found))) == "refused"


@settings(max_examples=400, deadline=None, derandomize=True)
@given(content=st.binary(max_size=40) | st.text('[]{}=".\\n0x1e_-:ud8tuf#\'', max_size=40).map(str.encode))
@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_any_bytes_of_a_file_are_tables_or_refused(
    suffix: str, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    outcome(lambda: recipe.check_tables(recipe.read_tables(path), str(path)))


FILES = {
    "deep.toml": b"a = " + b"[" * 100_000,
    "tables.toml": b"[" + b"a." * 20_000 + b"b]",
    "deep.json": b"[" * 100_000,
    "nested.json": b'{"model": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    "nested list.json": b'{"model": {"num_layers": ' + b"[" * 900 + b"]" * 900 + b"}}",
    "digits.json": b'{"model": {"num_layers": ' + b"9" * 5000 + b"}}",
    "digits.toml": b"[model]\nnum_layers = " + b"9" * 5000,
    "infinity.json": b'{"optimizer": {"lr": Infinity}}',
    "nan.toml": b"[optimizer]\nlr = nan",
    "date.toml": b"[model]\nnum_layers = 2026-01-01",
    "nul.json": b'{"checkpoint": {"save": "a\\u0000b"}}',
    "nul in a list.json": b'{"data": {"data_path": ["a\\u0000b"]}}',
    "long path.json": b'{"checkpoint": {"save": "' + b"a" * 256 + b'"}}',
    "deep path.json": b'{"checkpoint": {"save": "' + b"a/" * 3000 + b'"}}',
    "half a letter.json": b'{"checkpoint": {"save": "\\ud800"}}',
    "long word.json": b'{"model": {"' + b"a" * 1_000_000 + b'": 1}}',
    "long name.json": b'{"' + b"a" * 1_000_000 + b'": 1}',
    "twice.toml": b"[model]\n[model]\n",
    "UTF-16.json": "{}".encode("utf-16"),
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_files_are_refused_in_a_few_words(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert outcome(lambda: RunConfig.load(["--config", str(path)])) == "refused"


@pytest.mark.parametrize("flag", ["--save", "--load", "--log-dir", "--data-path", "--tokenizer-model"])
@pytest.mark.parametrize("word", ["a\udcffb", "a\0b"])
def test_words_of_the_command_line_are_text(flag: str, word: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag}.*expected a"):
        RunConfig.load([*DENSE_FLAGS, flag, word])


def test_a_path_that_no_file_system_takes_is_refused_by_its_length() -> None:
    with pytest.raises(ConfigError, match="--load b/aaa.*up to 255 bytes and paths up to 3900, not 256 and 258"):
        RunConfig.load([*DENSE_FLAGS, "--load", "b/" + "a" * 256])
    RunConfig.load([*DENSE_FLAGS, "--save", "b/" + "a" * 255])


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "endless.toml").symlink_to("/dev/zero")
    assert outcome(lambda: RunConfig.load(["--config", str(tmp_path / "endless.toml")])) == "refused"
    with (tmp_path / "huge.json").open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    with pytest.raises(ConfigError, match="more than 10,000,000 bytes"):
        RunConfig.load(["--config", str(tmp_path / "huge.json")])
