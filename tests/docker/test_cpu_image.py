"""The CPU image's install step, outside Docker: the files that its Dockerfile copies, the command that it runs."""

import re
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.house.sources import ROOT

DOCKERFILES = ["Dockerfile.cpu", "Dockerfile.cuda"]


def instructions(name: str) -> list[list[str]]:
    """The Dockerfile as words, one list for each instruction; comments and line continuations taken away."""
    text = (ROOT / "docker" / name).read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def copied(name: str) -> list[tuple[str, str]]:
    """(source, destination) of every COPY, relative to the top of the repository and to the image's work folder."""
    pairs = []
    for words in instructions(name):
        if words[0] == "COPY":
            *sources, target = [word for word in words[1:] if not word.startswith("--")]
            pairs += [(source, source if target == "./" else target) for source in sources]
    return pairs


def install_step(name: str) -> list[str]:
    steps = [words[1:] for words in instructions(name) if words[0] == "RUN" and words[1] == "bash"]
    assert len(steps) == 1
    return steps[0]


def build_context(name: str, folder: Path) -> None:
    """Lay out in `folder` what the image holds before its install step."""
    for source, target in copied(name):
        # a file that the repository lacks would stop docker's build just as it stops this copy
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, folder / target)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source, _ in copied(name):
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in kept), f"{source} is ignored by .dockerignore"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_runs_as_nobody_special(name: str) -> None:
    users = [words[1] for words in instructions(name) if words[0] == "USER"]
    assert users == ["10001"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # installs torch, over the network where no wheel is at hand
def test_the_install_step_makes_an_environment_that_works(tmp_path: Path) -> None:
    context, venv = tmp_path / "context", tmp_path / "venv"
    context.mkdir()
    build_context("Dockerfile.cpu", context)
    replaced = {"/work/venv": str(venv), "${TORCH_INDEX}": ""}
    command = [replaced.get(word, word) for word in install_step("Dockerfile.cpu")]
    assert command == ["bash", "docker/install_cpu.sh", str(venv), ""]
    answer = subprocess.run(command, cwd=context, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "environment checked" in answer.stdout
    where = [str(venv / "bin/python"), "-c", "import megatron_moe; print(megatron_moe.__file__)"]
    seen = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert seen == str(context / "megatron_moe/__init__.py")
