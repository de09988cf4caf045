"""No pickle is opened unasked; one that would run code is refused by name; and what runs all the same stays shut in."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from megatron_moe.config.errors import CheckpointError
from megatron_moe.convert.megatron import child
from megatron_moe.convert.megatron.import_ import import_megatron
from megatron_moe.convert.megatron.inert import Inert
from megatron_moe.convert.megatron.isolation import Forbidden, audit_hook
from megatron_moe.convert.megatron.metadata import model_pieces
from megatron_moe.convert.megatron.restricted import Refused, load_file, load_metadata, load_tensor
from tests.convert.megatron.samples import (
    ALLOWED,
    GOLDEN,
    RANK_FILE,
    STEP_FOLDER,
    Trap,
    check_logits,
    copy_of,
    saved,
)
from tools.convert_checkpoint import main


def told(folder: Path, root: Path, *more: str) -> list[str]:
    return ["import-megatron", "--megatron-folder", str(folder), "--save", str(root), *more]


def test_without_permission_nothing_is_opened_and_the_pickles_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("a child process was started")

    monkeypatch.setattr(child, "_run", run)
    assert main(told(GOLDEN / "dense-torch_dist", tmp_path / "ckpt")) == 2
    error = capsys.readouterr().err
    assert "holds pickles (.metadata, __0_0.distcp, __0_1.distcp, common.pt)" in error
    assert "can run any code" in error
    assert "--allow-pickle" in error
    assert not (tmp_path / "ckpt").exists()


def test_the_whole_way_through_a_child_while_the_parent_cannot_unpickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trap(*_: Any, **__: Any) -> None:
        raise AssertionError("the parent opened a pickle")

    seen: dict[str, Any] = {}
    start = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        seen.update(options, command=command)
        return start(command, **options)

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, trap)
    monkeypatch.setattr(torch.serialization, "load", trap)
    monkeypatch.setattr(child.subprocess, "run", run)
    monkeypatch.setenv("A_SECRET_TOKEN", "0123456789")
    run_config = import_megatron(GOLDEN / "moe-torch-ep2", tmp_path / "ckpt", ALLOWED)
    monkeypatch.undo()
    check_logits(tmp_path / "ckpt", run_config, "moe")
    assert seen["command"][:2] == [sys.executable, "-I"]
    assert "shell" not in seen
    assert "A_SECRET_TOKEN" not in seen["env"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp", RANK_FILE])
def test_a_trap_is_refused_by_name_and_does_not_spring(file: str, tmp_path: Path) -> None:
    """Read here, without any fence: the loaders alone refuse it."""
    sentinel, path = tmp_path / "sentinel", tmp_path / "file"
    trap = Trap(sentinel)
    pickle.loads(pickle.dumps(trap))
    assert sentinel.read_text() == "opened"  # it does spring
    sentinel.unlink()
    if file == ".metadata":
        path.write_bytes(pickle.dumps({"state_dict_metadata": trap}))
        with pytest.raises(Refused, match=r"names pathlib\.Path\.write_text|names builtins\.getattr"):
            load_metadata(path)
    elif file == "__0_0.distcp":
        with pytest.raises(Refused, match="cannot be read"):
            load_tensor(saved(trap), "a piece")
    else:
        path.write_bytes(saved({"args": trap, "model": {}}))
        with pytest.raises(Refused, match=r"names .*write_text|names .*getattr|cannot be read"):
            load_file(path)
    assert not sentinel.exists()


HOSTILE = ["builtins.eval", "builtins.getattr", "os.system", "posix.system", "torch.load", "torch.hub.load"]


@pytest.mark.parametrize("name", HOSTILE)
def test_only_names_on_the_list_are_admitted_and_none_is_imported(name: str, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    path = tmp_path / ".metadata"
    path.write_bytes(f"c{module}\n{attribute}\n(S'1'\ntR.".encode())
    with pytest.raises(Refused, match=f"names {name}"):
        load_metadata(path)
    # a name on the list is not looked up either
    path.write_bytes(b"ctorch.distributed.checkpoint.metadata\nMetadata\n(S'1'\ntR.")
    assert type(load_metadata(path)).__mro__[1] is Inert


def test_broken_and_old_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    metadata = (GOLDEN / "dense-torch_dist" / STEP_FOLDER / ".metadata").read_bytes()
    for data in (b"", b"junk", metadata[:-3], metadata[:100], pickle.dumps([1])):
        path.write_bytes(data)
        with pytest.raises(Refused):
            load_metadata(path)
    path.write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(Refused, match="no file of torch.save since"):
        load_file(path)


def test_flipped_bytes_are_read_or_refused(tmp_path: Path) -> None:
    """600 mutations of what is opened: nothing but Refused comes of them."""
    step, path = GOLDEN / "dense-torch_dist" / STEP_FOLDER, tmp_path / "file"
    random = Random(3)
    for file, load in ((".metadata", lambda at: model_pieces(load_metadata(at))), ("common.pt", load_file)):
        original = (step / file).read_bytes()
        for _ in range(300):
            data = bytearray(original)
            for _ in range(random.choice((1, 1, 4))):
                data[random.randrange(len(data))] = random.randrange(256)
            path.write_bytes(data)
            with contextlib.suppress(Refused), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about the protocol of a pickle
                load(path)


def test_a_trap_in_a_checkpoint_ends_the_conversion_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of("dense-torch_dist", tmp_path)
    (folder / "common.pt").write_bytes(saved({"args": Trap(tmp_path / "sentinel")}))
    assert main(told(folder, tmp_path / "ckpt", "--allow-pickle")) == 65
    error = capsys.readouterr().err
    assert "the child process that opens its pickles refused" in error
    assert "common.pt names" in error
    assert "Traceback" not in error
    assert not (tmp_path / "sentinel").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense-torch_dist"]


# a loader without a list, in a process that is fenced in as the child is
FENCED = """
import io, json, pickle, sys
sys.path[:] = json.loads(sys.argv[1])
from pathlib import Path
from megatron_moe.convert.megatron.isolation import leave_network, limit_resources, refuse_side_effects
leave_network()
from tests.convert.megatron.payloads import PAYLOADS
outside, output, port, parent = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
limit_resources(memory=1 << 28, file_bytes=1 << 20, cpu_seconds=60)
refuse_side_effects(output)
found = {}
for name, payload in PAYLOADS.items():
    try:
        payload(outside, port, parent)
        found[name] = "done"
    except BaseException as error:
        found[name] = type(error).__name__
(output / "found.json").write_text(json.dumps(found))
"""


def test_code_that_runs_all_the_same_touches_nothing_outside(tmp_path: Path) -> None:
    outside, output = tmp_path / "outside", tmp_path / "output"
    outside.mkdir()
    output.mkdir()
    (outside / "precious").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        paths = [os.path.abspath(path) for path in sys.path if path]
        arguments = [json.dumps(paths), str(outside), str(output), str(server.getsockname()[1]), str(os.getpid())]
        subprocess.run([sys.executable, "-I", "-c", FENCED, *arguments], check=True, timeout=100)
        with pytest.raises(TimeoutError):
            server.accept()
    found = json.loads((output / "found.json").read_text())
    memory = found.pop("takes endless memory")
    assert set(found.values()) == {"Forbidden"}, found
    assert memory == "MemoryError"
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "kept"


def test_the_hook_lets_reading_and_its_own_folder_pass(tmp_path: Path) -> None:
    hook = audit_hook(tmp_path / "own")
    hook("open", ("/etc/hostname", "r", os.O_RDONLY | os.O_CLOEXEC))
    hook("open", (str(tmp_path / "own" / "file"), "w", os.O_WRONLY | os.O_CREAT))
    hook("open", (3, "w", os.O_WRONLY))
    hook("import", ("torch", None, None))
    for path in (tmp_path / "own" / ".." / "file", tmp_path / "owner", Path("/dev/shm/x")):
        with pytest.raises(Forbidden, match="writing"):
            hook("open", (str(path), "w", os.O_WRONLY | os.O_CREAT))
    os.symlink(tmp_path, tmp_path / "link")
    (tmp_path / "own").mkdir()
    os.symlink(tmp_path, tmp_path / "own" / "way_out")
    with pytest.raises(Forbidden, match="writing"):
        hook("open", (str(tmp_path / "own" / "way_out" / "file"), "w", os.O_WRONLY))
    for event in ("pickle.find_class", "socket.connect", "ctypes.dlopen", "os.system", "os.rename"):
        with pytest.raises(Forbidden):
            hook(event, ("a", "b"))


def test_a_child_that_dies_is_told_with_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "START", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(CheckpointError, match="was ended by SIGKILL: it said nothing. Nothing was written"):
        import_megatron(GOLDEN / "dense-torch_dist", tmp_path / "ckpt", ALLOWED)
    monkeypatch.setattr(child, "START", "raise SystemExit('no room')")
    with pytest.raises(CheckpointError, match="failed with exit code 1: no room"):
        import_megatron(GOLDEN / "dense-torch_dist", tmp_path / "ckpt", ALLOWED)
    assert not list(tmp_path.iterdir())
