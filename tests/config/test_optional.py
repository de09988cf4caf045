"""Optional libraries are named with the line that installs them."""

import json
from pathlib import Path

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.optional import require


def test_a_library_that_is_there_is_returned() -> None:
    assert require("json", extra="data") is json


@pytest.mark.parametrize("name", ["no_such_library_of_ours", "no_such_library_of_ours.part"])
def test_a_missing_library_names_the_line_that_installs_it(name: str) -> None:
    with pytest.raises(ConfigError, match=r'is not installed.*pip install "megatron_moe\[te\]"'):
        require(name, extra="te")


def test_a_library_that_lacks_a_part_of_its_own_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_library_of_ours.py").write_text("import the_other_half_of_ours\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be imported \(No module named 'the_other_half_of_ours'\)"):
        require("half_a_library_of_ours", extra="te")
