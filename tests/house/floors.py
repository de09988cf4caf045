"""The floors as rules over import statements: who may import whom, where, and which libraries."""

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.house.sources import Finding

FLOORS = {
    "config": 0,
    "parallel": 1,
    "ops": 1,
    "layers": 2,
    "data": 2,
    "pipeline": 2,
    "optim": 2,
    "checkpoint": 2,
    "moe": 3,
    "convert": 3,
    "models": 4,
    "training": 5,
    "planning": 5,
    "inference": 5,
    "report": 5,
    "certify": 6,
    "main": 7,
    "tools": 7,
    "examples": 7,
}
# convert stands on one room of floor 2 only
STANDS_ON = {"convert": {"checkpoint"}}
# the programs of the package, in no room
MAIN_FILES = {"pretrain", "finetune", "launch"}


@dataclass(frozen=True)
class Import:
    """One imported name, absolute: `megatron_moe.parallel.grid`."""

    line: int
    name: str


def imports(source: str, module: str) -> Iterator[Import]:
    """All imports of a file anywhere in it. `from a import b` counts as `a.b`; `module` resolves relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def room(module: str) -> str | None:
    """`megatron_moe.moe.plan` -> `moe`; the package itself and what is not ours are in no room."""
    parts = module.split(".")
    if parts[0] != "megatron_moe":
        return parts[0] if parts[0] in FLOORS else None
    if len(parts) == 1:
        return None
    return "main" if parts[1] in MAIN_FILES else parts[1]


def upward_imports(source: str, module: str) -> list[Finding]:
    """A file imports only from lower floors or from its own room; nothing that people run imports tests."""
    here = room(module)
    if here is None:
        return []
    if here not in FLOORS:
        return [Finding(1, f"room '{here}' stands on no floor; give it one in {__name__}")]
    found = []
    for item in imports(source, module):
        there = room(item.name)
        if item.name.split(".")[0] == "tests":
            found.append(Finding(item.line, f"'{here}' imports '{item.name}', a test"))
        if there is None or there == here or there not in FLOORS:
            continue
        below = FLOORS[there] < FLOORS[here]
        denied = FLOORS[there] == 2 and there not in STANDS_ON.get(here, {there})
        if not below or denied:
            found.append(Finding(item.line, f"'{here}' may not import '{item.name}'"))
    return found


def import_loops(sources: dict[str, str]) -> list[list[str]]:
    """Loops of modules that import each other, each as the list of its modules. sources: module name -> text."""
    edges: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = {item.name for item in imports(source, module)}
        # `from a.b import c` means the module a.b.c if there is one, else a.b
        targets = {name if name in sources else name.rpartition(".")[0] for name in names}
        edges[module] = {target for target in targets if target in sources and target != module}
    loops: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            loops.append(path[path.index(module) :])
            return
        if module in done:
            return
        for target in sorted(edges[module]):
            visit(target, [*path, module])
        done.add(module)

    for module in sorted(sources):
        visit(module, [])
    return loops


def foreign_imports(source: str, module: str, libraries: Iterable[str]) -> list[Finding]:
    """Outside the standard library a file imports only `libraries` (config: none); others come through require()."""
    ours = {"megatron_moe", "tools", "examples", "tests"}
    allowed = ours if room(module) == "config" else ours | set(libraries)
    return [
        Finding(item.line, f"'{item.name}' is no library of this floor; optional ones come through require()")
        for item in imports(source, module)
        if item.name.split(".")[0] not in allowed and item.name.split(".")[0] not in sys.stdlib_module_names
    ]


def hidden_imports(source: str) -> list[Finding]:
    """Imports stand at the top of a file, never in a function or class, and are never made from strings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = (child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom))
            found += [Finding(child.lineno, f"import inside '{node.name}'") for child in inner]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"__import__", "import_module", "importlib.import_module"}:
                found.append(Finding(node.lineno, f"{called}(): optional libraries come through require()"))
    return sorted(set(found), key=lambda finding: finding.line)
