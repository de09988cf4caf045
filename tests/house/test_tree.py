"""The top level, the names of tests, the packages that are pinned, the commands in the documents."""

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.house.commands import commands, missing
from tests.house.sources import PRODUCT, ROOT, files

TOP_LEVEL = {"megatron_moe", "tools", "examples", "tests", "docker", "setup.py", "README.md", "LICENSE"}
# made by running or building, and ignored by git
MADE = {"runs", "build", "dist", "megatron_moe.egg-info", "__pycache__"}
VAGUE = {"utils", "helpers", "common", "misc"}
# import name -> project name on the package index, where they differ
PROJECTS = {"pynvml": "nvidia-ml-py", "transformer_engine": "transformer-engine"}


def packaging() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="read")


def pins() -> dict[str, str]:
    lines = (ROOT / ".constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_top_level_holds_only_what_the_map_shows() -> None:
    seen = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert seen - MADE - TOP_LEVEL == set()


def test_no_file_is_named_for_nothing() -> None:
    assert [str(path) for path in files((".py", ".sh")) if path.stem in VAGUE] == []


def test_tests_are_where_pytest_finds_them() -> None:
    """A test function in a file of another name would never run; an __init__.py would change how all are imported."""
    for path in files((".py",), ("tests",)):
        assert path.name != "__init__.py", path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        has_tests = any(name.startswith(("test_", "Test")) for name in names)
        assert has_tests == path.name.startswith("test_"), path


def test_what_the_commands_install_is_pinned_within_its_range() -> None:
    settings, pinned = packaging(), pins()
    lists = [settings["CORE"], *(settings["EXTRAS"][extra] for extra in ("quickstart", "data", "dev"))]
    wanted = [Requirement(text) for texts in lists for text in texts]
    for requirement in wanted:
        assert requirement.name in pinned, requirement
        assert requirement.specifier.contains(pinned[requirement.name]), requirement
    assert pinned.keys() - {requirement.name for requirement in wanted} == {"pip"}  # it installs the rest
    assert list(pinned) == sorted(pinned)


def test_apex_is_nvidias() -> None:
    """The project `apex` on the package index is an unrelated one."""
    apex = [Requirement(text) for text in packaging()["EXTRAS"]["apex"]]
    assert [requirement.url for requirement in apex] == ["git+https://github.com/NVIDIA/apex"]


def test_every_required_library_is_in_the_extra_that_the_error_names() -> None:
    extras, core = packaging()["EXTRAS"], packaging()["CORE"]
    for path in files((".py",), PRODUCT):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "require"):
                continue
            given = [*node.args, *(item.value for item in node.keywords)]
            values = [str(value.value) for value in given if isinstance(value, ast.Constant)]
            if len(values) == 2:
                module, extra = values[0].split(".")[0], values[1]
                offered = {Requirement(text).name for text in [*core, *extras.get(extra, [])]}
                assert extra in extras, f"{path}:{node.lineno}: there is no extra '{extra}'"
                assert PROJECTS.get(module, module) in offered, f"{path}:{node.lineno}: {values} is not in setup.py"


DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / ".github").glob("*.md"), *files((".md",))])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_name_what_exists(document: Path) -> None:
    extras = set(packaging()["EXTRAS"])
    lines = commands(document.read_text(encoding="utf-8"))
    assert {line: names for line in lines if (names := missing(line, ROOT, extras))} == {}


def test_commands_are_read_from_shell_blocks_only() -> None:
    text = "```bash\n$ bash a.sh \\\n    --b  # why\n\n# a remark\nX=1 python c.py\n```\n```python\nimport os\n```\n"
    assert commands(text) == ["bash a.sh --b  # why", "X=1 python c.py"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("bash tests/run.sh --venv somewhere", []),
        ("python -m torch.distributed.run -m megatron_moe.absent --save runs/x", ["megatron_moe.absent"]),
        ("python tools/absent.py data/x.json", ["tools/absent.py"]),
        ('pip install ".[absent]"', ["[absent]"]),
        ('pip install -e ".[data,test]"', []),
        ("bash examples/environment.sh && bash docker/absent.sh", ["docker/absent.sh"]),
    ],
)
def test_a_command_that_names_nothing_is_found(command: str, expected: list[str]) -> None:
    assert missing(command, ROOT, set(packaging()["EXTRAS"])) == expected


def test_the_first_lines_of_the_licence_are_apaches() -> None:
    assert re.match(r"\s*Apache License\s+Version 2\.0, January 2004", (ROOT / "LICENSE").read_text())
