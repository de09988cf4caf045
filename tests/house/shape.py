"""The shape of the code as rules: length, no global state, captions, nothing left unfinished."""

import ast
import io
import re
import tokenize

from tests.house.sources import Finding

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MUTABLE_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter"}
MUTATING_METHODS = {
    "append",
    "extend",
    "insert",
    "remove",
    "pop",
    "popitem",
    "clear",
    "update",
    "setdefault",
    "discard",
}
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]+")
# tensors have upper-case names of a letter or two, and may be written to
REGISTRY = re.compile(r"_?[A-Z][A-Z0-9_]{2,}")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?!\(#?\d+\):)")


def long_file(source: str) -> list[Finding]:
    """A file over 400 lines is two ideas."""
    lines = len(source.splitlines())
    return [Finding(lines, f"{lines} lines, more than {MAX_FILE_LINES}")] if lines > MAX_FILE_LINES else []


def long_functions(source: str) -> list[Finding]:
    """No function over 60 lines, its docstring included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(Finding(node.lineno, f"'{node.name}' has {lines} lines, more than {MAX_FUNCTION_LINES}"))
    return found


def global_statements(source: str) -> list[Finding]:
    """Who is where, and what is known, is passed in."""
    nodes = ast.walk(ast.parse(source))
    return [Finding(node.lineno, f"global {', '.join(node.names)}") for node in nodes if isinstance(node, ast.Global)]


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MUTABLE_CALLS
    return isinstance(value, MUTABLE_NODES)


def module_state(source: str) -> list[Finding]:
    """A list, dictionary or set at module level is a constant in UPPER_CASE, or should not be there."""
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not is_mutable(node.value):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [ast.unparse(target) for target in targets]
        mutable = [name for name in names if not CONSTANT.fullmatch(name) and name != "__all__"]
        found += [Finding(node.lineno, f"module-level mutable value '{name}'") for name in mutable]
    return found


def rewritten_constants(source: str) -> list[Finding]:
    """A registry is written once, where it is defined: nobody adds to it, here or in a file that imports it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt | ast.expr):
            continue
        changed: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            changed = [target.value for target in node.targets if isinstance(target, ast.Subscript)]
        elif isinstance(node, ast.AugAssign):
            changed = [node.target.value if isinstance(node.target, ast.Subscript) else node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING_METHODS:
            changed = [node.func.value]
        names = [ast.unparse(value).rpartition(".")[2] for value in changed]
        registries = [name for name in names if REGISTRY.fullmatch(name)]
        found += [Finding(node.lineno, f"'{name}' is changed after it was written") for name in registries]
    return found


def caption_only(source: str) -> list[Finding]:
    """An __init__.py holds one line of docstring, the caption of its room."""
    body = ast.parse(source).body
    is_docstring = len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    if is_docstring and len(source.splitlines()) == 1:
        return []
    return [Finding(1, "holds more, or less, than a docstring of one line")]


def unfinished(source: str) -> list[Finding]:
    """A TODO names its issue, `TODO(12):`; a comment without one is a wish."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT and UNFINISHED.search(token.string)]
    return [Finding(token.start[0], token.string) for token in comments]


def not_implemented(source: str) -> list[Finding]:
    """What cannot be done is refused with a ConfigError before the run, not met in the middle of it."""
    names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    return [Finding(name.lineno, name.id) for name in names if name.id == "NotImplementedError"]
