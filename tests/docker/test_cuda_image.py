"""The CUDA image's install step against a stand-in for the environment: what is installed, kept and refused."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.house.sources import ROOT

# stands in for the functions that look at Python and install with pip; says what it was asked
STAND_IN = """
find_torch() { [[ -n $HAS_TORCH ]]; }
make_environment() { echo "environment $1 $2"; mkdir -p "$2/bin"; ln -sf "$FAKE/python" "$2/bin/python"; }
run_pip() { shift; echo "pip $APEX_CPP_EXT$APEX_CUDA_EXT $*"; }
"""
# has_module asks `python -c CODE NAME`
PYTHON = """#!/bin/bash
[[ " $MODULES " == *" $3 "* ]]
"""


def install(folder: Path, torch: str, modules: str) -> subprocess.CompletedProcess[str]:
    """docker/install_cuda.sh in a copy of the repository's layout, on an image with this torch and these modules."""
    for name in ("docker", "examples"):
        (folder / name).mkdir()
    script = folder / "docker/install_cuda.sh"
    script.write_text((ROOT / "docker/install_cuda.sh").read_text())
    (folder / "examples/environment.sh").write_text((ROOT / "examples/environment.sh").read_text() + STAND_IN)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    environment = {**os.environ, "FAKE": str(folder), "HAS_TORCH": torch, "MODULES": modules}
    command = ["bash", str(script), str(folder / "venv")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_what_the_base_image_brings_is_used(tmp_path: Path) -> None:
    answer = install(tmp_path, torch="2.12", modules="transformer_engine apex")
    assert answer.returncode == 0, answer.stderr
    venv = tmp_path / "venv"
    assert answer.stdout.splitlines()[:2] == [f"environment quickstart {venv}", f"environment data {venv}"]
    assert "pip" not in answer.stdout


def test_apex_is_built_where_the_base_image_has_none(tmp_path: Path) -> None:
    answer = install(tmp_path, torch="2.12", modules="transformer_engine")
    assert answer.returncode == 0, answer.stderr
    line = next(line for line in answer.stdout.splitlines() if line.startswith("pip"))
    assert line == f"pip 11 -c {tmp_path}/venv/constraints.txt --no-build-isolation -e .[apex]"


@pytest.mark.parametrize(
    ("torch", "modules", "told"), [("", "transformer_engine", "NGC_TAG"), ("2.12", "apex", "Transformer Engine")]
)
def test_an_unfit_base_image_is_refused(tmp_path: Path, torch: str, modules: str, told: str) -> None:
    answer = install(tmp_path, torch=torch, modules=modules)
    assert answer.returncode == 1
    assert told in answer.stderr
