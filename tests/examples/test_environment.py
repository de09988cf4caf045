"""examples/environment.sh: which torch will do, what is left alone, and that a second call costs nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.house.sources import ROOT

SCRIPT = ROOT / "examples/environment.sh"


def bash(code: str, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run code after sourcing the script; `arguments` are $1, $2, ...; `path` goes before the others on PATH."""
    command = ["bash", "-euo", "pipefail", "-c", f'source "{SCRIPT}"\n{code}', "bash", *arguments]
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def python_with_torch(folder: Path, version: str, works: bool = True) -> str:
    """An interpreter that has this version of torch, as far as the script can tell."""
    site = folder / "site"
    info = site / f"torch-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("" if works else "raise OSError('libcudart.so')\n")
    python = folder / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("version", ["2.11.0", "2.12.0a0+5bf4d3c.nv26.05", "2.13.0+cpu", "2.13.1"])
def test_a_torch_within_the_range_is_used(tmp_path: Path, version: str) -> None:
    answer = bash('find_torch "$1"', python_with_torch(tmp_path, version))
    assert answer.stdout.split()[:2] == [version, str(tmp_path / "site")]


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0", "2.14.0", "3.0.0"])
def test_a_torch_outside_the_range_is_not_used(tmp_path: Path, version: str) -> None:
    assert bash('find_torch "$1"', python_with_torch(tmp_path, version)).returncode != 0


def test_a_torch_that_does_not_start_is_not_used(tmp_path: Path) -> None:
    assert bash('find_torch "$1"', python_with_torch(tmp_path, "2.13.0", works=False)).returncode != 0


def test_the_python_that_has_torch_is_preferred(tmp_path: Path) -> None:
    python = python_with_torch(tmp_path, "2.13.0")
    assert bash("find_python", path=str(tmp_path)).stdout.strip() == python


@pytest.mark.slow  # makes an environment
def test_a_torch_in_an_active_environment_is_seen_from_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "seen_from_inside.py").touch()
    found = f"2.13.0 {tmp_path / 'outer'} yes"
    made = bash('make_venv "$1" "$2" "$3"', sys.executable, str(tmp_path / "venv"), found)
    assert made.returncode == 0, made.stderr
    subprocess.run([str(tmp_path / "venv/bin/python"), "-c", "import seen_from_inside"], check=True)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    answer = bash('make_environment test "$1"', str(tmp_path))
    assert answer.returncode == 2
    assert "no virtual environment" in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_second_call_is_over_at_once_and_a_changed_pin_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert bash('environment_stamp test >"$1/installed-test"', str(tmp_path)).returncode == 0
    # pip is never reached: install_package would fail the call
    code = 'install_package() { return 9; }; make_venv() { return 8; }; make_environment "$2" "$1"'
    start = time.monotonic()
    assert bash(code, str(tmp_path), "test").returncode == 0
    assert time.monotonic() - start < 1
    assert bash(code, str(tmp_path), "quickstart").returncode == 9
    (tmp_path / "installed-test").write_text("the stamp of another day\n")
    assert bash(code, str(tmp_path), "test").returncode == 9


def test_a_stage_says_what_it_was_and_passes_failure_on() -> None:
    answer = bash('stage "all well" true; stage "all ill" false')
    assert answer.returncode == 1
    assert answer.stdout.endswith("s] all well\n")
    assert "all ill: FAILED with exit code 1" in answer.stderr
