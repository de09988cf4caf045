"""A file imports only from lower floors or its own room, at its top, and no library that is optional."""

import runpy

import pytest
from packaging.requirements import Requirement

from tests.house.floors import foreign_imports, hidden_imports, import_loops, upward_imports
from tests.house.sources import PRODUCT, ROOT, files


def module_sources() -> dict[str, str]:
    """Module name -> text of everything people run."""
    found = {}
    for path in files((".py",), PRODUCT):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def core_libraries() -> set[str]:
    """The import names of setup.py's core list; each is its project's name."""
    core = runpy.run_path(str(ROOT / "setup.py"), run_name="read")["CORE"]
    return {Requirement(requirement).name for requirement in core} | {"setuptools"}


def test_no_file_imports_upward() -> None:
    assert {name: found for name, text in module_sources().items() if (found := upward_imports(text, name))} == {}


def test_no_modules_import_each_other_in_a_loop() -> None:
    assert import_loops(module_sources()) == []


def test_only_core_libraries_are_imported_outright() -> None:
    libraries = core_libraries()
    # an example may import outright what its extra brings
    sources = {name: text for name, text in module_sources().items() if not name.startswith("examples.")}
    assert {name: found for name, text in sources.items() if (found := foreign_imports(text, name, libraries))} == {}


def test_imports_stand_at_the_top() -> None:
    sources = module_sources()
    del sources["megatron_moe.config.optional"]  # the one place that imports by name
    assert {name: found for name, text in sources.items() if (found := hidden_imports(text))} == {}


def test_the_tree_is_read() -> None:
    assert {"megatron_moe", "megatron_moe.config.errors", "setup"} <= module_sources().keys()
    assert {"torch", "numpy"} <= core_libraries()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("megatron_moe.ops.permute", "from megatron_moe.parallel.grid import Grid"),
        ("megatron_moe.layers.norm", "import megatron_moe.data.batch"),
        ("megatron_moe.layers.norm", "from megatron_moe import models"),
        ("megatron_moe.layers.norm", "from ..moe import plan"),
        ("megatron_moe.convert.mixtral", "from megatron_moe.layers.norm import Norm"),
        ("megatron_moe.training.step", "from megatron_moe.planning.memory import bytes_of"),
        ("megatron_moe.config.run", "from tests.ranks import run_on_ranks"),
        ("megatron_moe.models.gpt", "if True:\n    from tools.plan import main"),
        ("tools.plan", "from megatron_moe.pretrain import main"),
        ("megatron_moe.misc.things", "import os"),
    ],
)
def test_an_import_upward_or_sideways_is_found(module: str, line: str) -> None:
    assert len(upward_imports(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("megatron_moe.layers.norm", "from megatron_moe.ops.backend import Backend"),
        ("megatron_moe.layers.norm", "from megatron_moe.layers.context import ForwardContext"),
        ("megatron_moe.convert.mixtral", "from megatron_moe.checkpoint.blocks import Block"),
        ("megatron_moe.moe.layer", "from megatron_moe.layers.linear import Linear"),
        ("megatron_moe.finetune", "from megatron_moe.pretrain import main"),
        ("tools.plan", "from megatron_moe.planning.memory import bytes_of"),
    ],
)
def test_an_import_downward_is_allowed(module: str, line: str) -> None:
    assert upward_imports(line, module) == []


def test_a_loop_is_found() -> None:
    sources = {"a.b": "from a import c", "a.c": "from a.d import thing", "a.d": "import a.b", "a.e": "import a.b"}
    assert import_loops(sources) == [["a.b", "a.c", "a.d"]]


@pytest.mark.parametrize(
    "line",
    ["import transformers", "from triton import language", "try:\n    import apex\nexcept ImportError:\n    pass"],
)
def test_an_optional_library_imported_outright_is_found(line: str) -> None:
    assert len(foreign_imports(line, "megatron_moe.ops.norm", {"torch"})) == 1


def test_config_imports_not_even_torch() -> None:
    assert foreign_imports("import torch", "megatron_moe.config.run", {"torch"}) != []
    assert foreign_imports("import torch", "megatron_moe.ops.norm", {"torch"}) == []


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    import os",
        "class A:\n    from os import path",
        "import importlib\nx = importlib.import_module('apex')",
        "x = __import__('apex')",
    ],
)
def test_an_import_below_the_top_is_found(text: str) -> None:
    assert len(hidden_imports(text)) == 1
