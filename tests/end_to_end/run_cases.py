"""Runs many commands in one process, for it is Python's start that takes long.    python -O run_cases.py cases.json

cases.json: {name: {"program": ..., "arguments": [...], "watched": folder}}; prints {name: {...}} with what they said.
"""

import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from megatron_moe import pretrain
from tests.end_to_end.commands import fingerprint
from tools import preprocess_data

PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {"pretrain": pretrain.main, "preprocess": preprocess_data.main}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    before = fingerprint(Path(case["watched"]))
    out, said = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said):
        try:
            code: Any = PROGRAMS[case["program"]](case["arguments"])
        except SystemExit as ending:
            code = ending.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    after = fingerprint(Path(case["watched"]))
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return {"code": code, "said": said.getvalue(), "out": out.getvalue(), "changed": changed, "checks": __debug__}


def run_cases(path: Path) -> None:
    torch.set_num_threads(1)
    cases = json.loads(path.read_text())
    print(json.dumps({name: run_case(case) for name, case in cases.items()}))


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
