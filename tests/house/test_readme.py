"""Every flag that the README names is one that some command takes."""

import re

import pytest

from megatron_moe.config.run import RunConfig
from tests.house.sources import ROOT

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def test_every_flag_of_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        RunConfig.load(["--help"])
    known = set(FLAG.findall(capsys.readouterr().out))
    # other commands state their flags in their own sources
    for path in [*ROOT.glob("tools/**/*.py"), *ROOT.glob("tools/**/*.sh"), *ROOT.glob("examples/**/*.*")]:
        if path.suffix in (".py", ".sh", ".sbatch"):
            known |= set(FLAG.findall(path.read_text(encoding="utf-8")))
    named = set(FLAG.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert named and named - known == set()
