"""What never runs: pickled objects, strings in a shell, code from a model repository; and what always does."""

import ast

from tests.house.sources import Finding

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# run by a confined child process only, which a person has to allow (see its docstring)
PICKLE_FILE = "megatron_moe/convert/megatron/restricted.py"
SHELL_CALLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((item.value for item in call.keywords if item.arg == name), None)


def is_constant(value: ast.expr | None, expected: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is expected


def calls(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def pickles(source: str) -> list[Finding]:
    """No pickle by any name: loading one runs what it says. torch.load only with weights_only=True."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        from_module = node.module if isinstance(node, ast.ImportFrom) else None
        names = [from_module] if from_module else [alias.name for alias in node.names]
        found += [Finding(node.lineno, f"import of {name}") for name in names if name.split(".")[0] in PICKLERS]
    for call in calls(source):
        called = ast.unparse(call.func)
        if called == "torch.load" and not is_constant(keyword(call, "weights_only"), True):
            found.append(Finding(call.lineno, "torch.load without weights_only=True"))
        if called == "torch.save":
            found.append(Finding(call.lineno, "torch.save writes a pickle; weights are safetensors"))
        allow = keyword(call, "allow_pickle")
        if allow is not None and not is_constant(allow, False):
            found.append(Finding(call.lineno, f"{called} with allow_pickle"))
        if called.endswith(("read_pickle", "to_pickle")):
            found.append(Finding(call.lineno, called))
    return found


def shells(source: str) -> list[Finding]:
    """Commands are lists of arguments: a name with a space or a semicolon stays one argument."""
    found = []
    for call in calls(source):
        called = ast.unparse(call.func)
        shell = keyword(call, "shell")
        if shell is not None and not is_constant(shell, False):
            found.append(Finding(call.lineno, f"{called} with shell={ast.unparse(shell)}"))
        if called in SHELL_CALLS:
            found.append(Finding(call.lineno, called))
    return found


def remote_code(source: str) -> list[Finding]:
    """Code that came with a model or in a string is not run."""
    found = []
    for call in calls(source):
        called = ast.unparse(call.func)
        trust = keyword(call, "trust_remote_code")
        if trust is not None and not is_constant(trust, False):
            found.append(Finding(call.lineno, f"{called} with trust_remote_code={ast.unparse(trust)}"))
        if called in {"eval", "exec"}:
            found.append(Finding(call.lineno, f"{called}()"))
    return found


def skippable_checks(source: str) -> list[Finding]:
    """python -O leaves assertions out: they may narrow a type (is not None, isinstance, issubclass), not check."""
    return [
        Finding(node.lineno, f"assert {ast.unparse(node.test)}: raise an error instead")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assert) and not all(map(_narrows, _terms(node.test)))
    ] + [
        Finding(node.lineno, "__debug__")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and node.id == "__debug__"
    ]


def _terms(test: ast.expr) -> list[ast.expr]:
    return test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]


def _narrows(test: ast.expr) -> bool:
    if isinstance(test, ast.Call):
        return ast.unparse(test.func) in {"isinstance", "issubclass"}
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return False
    plain = isinstance(test.left, ast.Name | ast.Attribute)
    return plain and isinstance(test.ops[0], ast.IsNot) and is_constant(test.comparators[0], None)
