"""Starting the child process that opens pickles, and reading the plain files that it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_moe.config.errors import CheckpointError, ConfigError
from megatron_moe.convert.hf_folder import read_json
from megatron_moe.convert.megatron.folder import Iteration

INDEX = "opened.json"
# the module search path comes as it is here; nothing else of the environment does
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_moe.convert.megatron.isolation import leave_network; isolation = leave_network(); "
    "from megatron_moe.convert.megatron.opener import main; sys.exit(main([*sys.argv[2:], isolation]))"
)


@dataclass(frozen=True)
class OpenedFile:
    """What one file of the checkpoint held. tensors: name -> {"pieces": [[key, offset], ...], ...} in `weights`."""

    source: str
    weights: Path
    arguments: Mapping[str, Any]
    iteration: int | None
    tensors: Mapping[str, Any]
    ignored: Mapping[str, str]


@dataclass(frozen=True)
class Opened:
    """The plain copy of a checkpoint. isolation: in words, what kept the child from the network."""

    isolation: str
    files: tuple[OpenedFile, ...]


def require_permission(iteration: Iteration, allowed: bool) -> None:
    """ConfigError that names the pickles, unless they are allowed."""
    if allowed:
        return
    names = [str(path.relative_to(iteration.folder)) for path in iteration.pickles]
    told = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    raise ConfigError(
        f"{iteration.folder} holds pickles ({told}), and opening a pickle can run any code that its writer put in. If "
        f"you trust where it comes from, give --allow-pickle: a child process without network opens them, admits only "
        f"what Megatron writes, and hands over plain numbers."
    )


@contextmanager
def opened(iteration: Iteration, scratch: Path) -> Iterator[Opened]:
    """The checkpoint's weights as plain files in a folder of `scratch`, as large as they are, which go afterwards.

    CheckpointError if the child refuses, fails, or runs into a limit.
    """
    with TemporaryDirectory(prefix=".megatron-import-", dir=scratch) as name:
        output = Path(name).resolve()
        _run(iteration.folder.resolve(), output)
        index = read_json(output / INDEX)
        files = index.get("files")
        if not isinstance(files, list) or not files:
            raise CheckpointError(f"{iteration.folder}: the child process left no list of files.")
        found = tuple(_file(entry, output / f"{number}.safetensors") for number, entry in enumerate(files))
        yield Opened(str(index.get("isolation")), found)


def _run(folder: Path, output: Path) -> None:
    paths = [os.path.abspath(path) for path in sys.path if path]
    command = [sys.executable, "-I", "-c", START, json.dumps(paths), str(folder), str(output)]
    environment = {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "HOME": str(output),
        "TMPDIR": str(output),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command,
        cwd=output,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        check=False,
    )
    if done.returncode == 0:
        return
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    raise CheckpointError(
        f"{folder}: the child process that opens its pickles {_ending(done.returncode)}: {last[0][:1000]}. Nothing was "
        f"written."
    )


def _ending(code: int) -> str:
    if code == 65:
        return "refused"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def _file(entry: Any, weights: Path) -> OpenedFile:
    tables = ("args", "tensors", "ignored")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), dict) for key in tables):
        raise CheckpointError(f"{weights.parent}: the child process left a list of files that is none.")
    step = entry.get("iteration")
    whole = step if isinstance(step, int) and not isinstance(step, bool) else None
    return OpenedFile(str(entry.get("source")), weights, entry["args"], whole, entry["tensors"], entry["ignored"])
