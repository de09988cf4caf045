"""The shell commands in a Markdown text, and what they name that does not exist."""

import re
import shlex
from pathlib import Path

FENCE = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OURS = ("megatron_moe/", "tools/", "examples/", "tests/", "docker/", ".ci/")


def commands(markdown: str) -> list[str]:
    """The command lines of all shell blocks, continuation lines joined, prompts and pure comments taken away."""
    lines = [line for block in FENCE.findall(markdown) for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    stripped = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in stripped if line and not line.startswith("#")]


def file_of(word: str) -> str:
    """Without the test of file::test, or the class of file.py:Class."""
    return re.sub(r"\.py:\w+$", ".py", word.split("::")[0])


def missing(command: str, root: Path, extras: set[str]) -> list[str]:
    """Files of this repository, modules run with -m and extras of the package that the command names in vain."""
    found = []
    words = shlex.split(command, comments=True)
    for before, word in zip(["", *words], words, strict=False):
        module = re.fullmatch(r"(megatron_moe|tools)(\.\w+)+", word)
        if before == "-m" and module:
            path = root / word.replace(".", "/")
            if not (path.with_suffix(".py").is_file() or path.is_dir()):
                found.append(word)
        elif word.removeprefix("./").startswith(OURS) and not (root / file_of(word)).exists():
            found.append(word)
        elif named := re.fullmatch(r"(?:\.|megatron_moe)\[([\w,]+)\]", word):
            found += [f"[{extra}]" for extra in named[1].split(",") if extra not in extras]
    return found
