"""Importing the package is cheap and asks for nothing optional."""

import json
import subprocess
import sys
from typing import Any

from tests.house.sources import ROOT

ACCELERATORS = {"triton", "transformer_engine", "apex"}
# torch's own distributed parts may ask for triton where it is installed
OPTIONAL = {"transformer_engine", "apex", "transformers", "sentencepiece", "tokenizers", "pyarrow", "matplotlib"}

MEASURE = """
import json, sys, time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
before = set(sys.modules)
start = time.perf_counter()
{ours}
ours_s = time.perf_counter() - start
brought = sorted({{name.split(".")[0] for name in set(sys.modules) - before}})
print(json.dumps({{"torch_s": torch_s, "ours_s": ours_s, "brought": brought}}))
"""
PACKAGE = "import megatron_moe, megatron_moe.config.errors, megatron_moe.parallel.state"
EVERY_FILE = """
import importlib, pkgutil, megatron_moe
for module in pkgutil.walk_packages(megatron_moe.__path__, "megatron_moe."):
    importlib.import_module(module.name)
"""


def measure(ours: str) -> dict[str, Any]:
    """What the import statements `ours` cost and bring after torch, in a process of their own."""
    command = [sys.executable, "-c", MEASURE.format(ours=ours)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 0, answer.stderr
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def test_import_adds_little_to_torch_and_no_accelerator() -> None:
    seen = measure(PACKAGE)
    # 0.15 s where torch itself takes 2 s; on a busy machine both grow together
    assert seen["ours_s"] < max(0.15, 0.075 * seen["torch_s"])
    assert ACCELERATORS & set(seen["brought"]) == set()
    assert "megatron_moe" in seen["brought"]


def test_every_file_imports_without_the_optional_libraries() -> None:
    assert OPTIONAL & set(measure(EVERY_FILE)["brought"]) == set()
