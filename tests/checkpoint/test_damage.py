"""Every flipped bit, every cut, every swapped or hostile file is noticed before a tensor is used."""

import copy
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from goals import Trials

from megatron_moe.checkpoint.load import examine, find_checkpoint
from megatron_moe.checkpoint.manifest import parse_manifest
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.errors import CheckpointError, NoCheckpointError
from tests.checkpoint.samples import ALONE, assert_holds_sample, newest, save_sample, whole_block

CPU = torch.device("cpu")


def tiny(root: Path, sha256: bool = True) -> Path:
    """A checkpoint whose every byte can be tried."""
    writer = CheckpointWriter(root, ALONE, None, "run", background=False, sha256=sha256)
    writer.save(1, {"model": [whole_block("w", torch.tensor([1.0, 2.0]))]}, {"n": 1}, "{}", {})
    return root / "step_00000001"


def problem(folder: Path, check: Any = "xxh3") -> str:
    found = examine(folder, 1, ALONE, CPU, check)
    return found if isinstance(found, str) else ""


@pytest.mark.goal("R8", ci=9000, nightly=9000, what="every bit of a checkpoint flipped: found, the file named")
def test_every_flipped_bit_is_detected(trials: Trials, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    assert problem(folder) == ""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        assert len(data) <= 4096
        with path.open("r+b") as file:
            for bit in range(8 * len(data)):
                position, value = bit // 8, data[bit // 8]
                os.pwrite(file.fileno(), bytes([value ^ (1 << bit % 8)]), position)
                told = problem(folder)
                assert path.name in told, (path.name, bit, told)
                os.pwrite(file.fileno(), bytes([value]), position)
                trials.add(1)
    assert problem(folder) == ""


@pytest.mark.goal("R7", ci=1000, nightly=1000, what="every file cut at every byte: found, the file named")
def test_every_cut_is_detected(trials: Trials, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for length in reversed(range(len(data))):
            os.truncate(path, length)
            told = problem(folder)
            assert path.name in told, (path.name, length, told)
            if path.name != "MANIFEST.json":
                assert f"has {length:,} bytes, but {len(data):,} were written" in told
            trials.add(1)
        path.write_bytes(data + b"\0")
        assert path.name in problem(folder)
        path.unlink()
        assert path.name in problem(folder)
        path.write_bytes(data)
    assert problem(folder) == ""


def test_sha256_finds_damage_too_and_sizes_alone_do_not(tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    path = folder / "model-r00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "model tensor 'w' [0:2] has another hash" in problem(folder)
    assert "the file has another hash" in problem(folder, "sha256")
    assert problem(folder, "sizes") == ""


def test_the_sha256_is_that_of_the_file_or_left_out(tmp_path: Path) -> None:
    name = "model-r00000.safetensors"
    for sha256 in (True, False):
        folder = tiny(tmp_path / str(sha256), sha256)
        entry = json.loads((folder / "MANIFEST.json").read_text())["files"][name]
        data = bytearray((folder / name).read_bytes())
        assert entry.get("sha256") == (hashlib.sha256(data).hexdigest() if sha256 else None)
        assert problem(folder, "sha256") == ""
        data[-1] ^= 1
        (folder / name).write_bytes(data)
        # without one, all bytes are still hashed, piece by piece
        assert ("the file" if sha256 else "model tensor 'w'") in problem(folder, "sha256")


@pytest.mark.goal("R10", ci=1, nightly=1, what="a file of another step, or of another run: refused")
@pytest.mark.parametrize("name", ["model-r00000.safetensors", "state.json", "MANIFEST.json"])
def test_a_file_of_another_step_or_run_is_rejected(trials: Trials, tmp_path: Path, name: str) -> None:
    save_sample(tmp_path / "a", 1)
    save_sample(tmp_path / "a", 2)
    shutil.copy(tmp_path / "a" / "step_00000001" / name, tmp_path / "a" / "step_00000002" / name)
    with pytest.raises(CheckpointError, match=name):
        newest(tmp_path / "a", strict=True)
    if name == "model-r00000.safetensors":
        # the same numbers and the same sizes, but another run: told by the header
        save_sample(tmp_path / "b", 1, run_id="not")
        shutil.copy(tmp_path / "b" / "step_00000001" / name, tmp_path / "a" / "step_00000001" / name)
        with pytest.raises(NoCheckpointError, match="the header has another hash"):
            newest(tmp_path / "a")
    trials.add(1)


def test_a_renamed_checkpoint_is_rejected(tmp_path: Path) -> None:
    save_sample(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000009")
    with pytest.raises(NoCheckpointError, match="is that of step 1, not of step_00000009"):
        newest(tmp_path)


@pytest.mark.goal("R9", ci=1, nightly=1, what="the newest 1, 2, 3 of 4 broken: the next, told once; strict exits 65")
@pytest.mark.parametrize("broken", [1, 2, 3])
def test_the_newest_whole_one_is_found_and_one_message_says_why(
    trials: Trials, tmp_path: Path, broken: int, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30, 40):
        save_sample(tmp_path, step)
    for step in (40, 30, 20)[:broken]:
        os.truncate(tmp_path / f"step_{step:08d}" / "optim-r00000.safetensors", 20)
    with caplog.at_level(logging.WARNING):
        reader = newest(tmp_path)
    assert reader.step == 40 - 10 * broken
    assert_holds_sample(reader)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].count("optim-r00000.safetensors has 20 bytes") == broken
    with pytest.raises(CheckpointError) as caught:
        newest(tmp_path, strict=True)
    assert caught.value.exit_code == 65
    trials.add(1)


def test_an_asked_for_step_is_found_or_refused(tmp_path: Path) -> None:
    for step in (10, 20):
        save_sample(tmp_path, step)
    assert find_checkpoint(tmp_path, 10, ALONE).step == 10
    with pytest.raises(NoCheckpointError, match="no checkpoint of step 15 .* there are: 20, 10") as missing:
        find_checkpoint(tmp_path, 15, ALONE)
    assert missing.value.exit_code == 64
    (tmp_path / "step_00000010" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="state.json is missing"):
        find_checkpoint(tmp_path, 10, ALONE)


def test_an_empty_or_absent_folder_is_told(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NoCheckpointError, match="There is no checkpoint in"):
            newest(root)


def test_links_and_pipes_are_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    for name in ("model-r00000.safetensors", "state.json", "MANIFEST.json"):
        aside = tmp_path / name
        (folder / name).rename(aside)
        (folder / name).symlink_to(aside)
        assert f"{name} cannot be opened" in problem(folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert f"{name} is not a plain file" in problem(folder)
        (folder / name).unlink()
        aside.rename(folder / name)
    assert problem(folder) == ""
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert "is not a folder" in problem(folder)


Tables = dict[str, Any]
Change = Callable[[Tables], Any]


def sealed(found: Tables) -> bytes:
    """As an attacker would write it: with a right hash."""
    body = json.dumps({key: value for key, value in found.items() if key != "sha256"})[:-1] + ",\n"
    return (body + f'"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"}}\n').encode()


def renamed_file(name: str) -> Change:
    def change(found: Tables) -> None:
        found["files"][name] = found["files"].pop("model-r00000.safetensors")
        found["parts"]["model"]["w"]["slices"][0]["file"] = name

    return change


def in_slice(**values: Any) -> Change:
    return lambda found: found["parts"]["model"]["w"]["slices"][0].update(values)


def in_tensor(**values: Any) -> Change:
    return lambda found: found["parts"]["model"]["w"].update(values)


def in_file(**values: Any) -> Change:
    return lambda found: found["files"]["model-r00000.safetensors"].update(values)


def doubled(found: Tables) -> None:
    found["parts"]["model"]["w"]["slices"] *= 2


def shared_bytes(found: Tables) -> None:
    found["parts"]["model"]["v"] = found["parts"]["model"]["w"]


HOSTILE: list[tuple[Change, str]] = [
    (renamed_file("../model-r00000.safetensors"), "refuses the file name"),
    (renamed_file("/etc/passwd"), "refuses the file name"),
    (renamed_file("a/model-r00000.safetensors"), "refuses the file name"),
    (renamed_file("model-r00000.safetensors\n"), "refuses the file name"),
    (renamed_file("MANIFEST.json"), "refuses the file name"),
    (renamed_file(""), "refuses the file name"),
    (in_slice(file="../../secret"), "no tensor file of these"),
    (in_slice(file="state.json"), "no tensor file of these"),
    (in_slice(file=3), "is not a name"),
    (in_slice(start=0), "overlap at byte"),
    (in_slice(start=-8), "is not a count"),
    (in_slice(start=1 << 70), "is not a count"),
    (in_slice(start=True), "is not a count"),
    (in_slice(start=1.5), "is not a count"),
    (in_slice(length=4), "cannot have 4 bytes"),
    (in_slice(offset=[1]), "cannot hold a slice"),
    (in_slice(shape=[2, 1]), "not of this form"),
    (in_slice(shape=[1], length=4), "no slice holds"),
    (in_slice(xxh3="00"), "is not a xxh3 digest"),
    (in_slice(xxh3=None), "is not a xxh3 digest"),
    (in_tensor(dtype="OBJECT"), "unknown dtype"),
    (in_tensor(shape=[3]), "no slice holds"),
    (in_tensor(shape="2"), "is not a shape"),
    (in_tensor(shape=[1 << 62, 1 << 62]), "cannot hold a slice"),
    (in_tensor(slices=[]), "no slice holds"),
    (in_tensor(slices=None), "not of this form"),
    (in_file(header=100_000_008, size=100_000_016), "at most 100,000,000 are read"),
    (in_file(header=0), "cannot have a header"),
    (in_file(size=1 << 40), "the slices end at byte"),
    (in_file(sha256="x"), "is not a sha256 digest"),
    (doubled, "overlap"),
    (shared_bytes, "overlap at byte"),
    (lambda found: found.update(schema=99), "schema 99 is unknown"),
    (lambda found: found.update(step="1"), "is not a count"),
    (lambda found: found.update(parts=[]), "not of this form"),
    (lambda found: found.pop("files"), "not of this form"),
    (lambda found: found["files"].pop("state.json"), "state.json is missing"),
    (lambda found: found["parts"].update({"../x": {}}), "refuses the part name"),
]


@pytest.mark.parametrize(("change", "told"), HOSTILE)
def test_a_manifest_that_lies_is_refused_though_its_hash_is_right(tmp_path: Path, change: Change, told: str) -> None:
    found = json.loads((tiny(tmp_path) / "MANIFEST.json").read_text())
    parse_manifest(sealed(found))
    change(found)
    with pytest.raises(CheckpointError, match=told):
        parse_manifest(sealed(found))


def test_nothing_but_a_checkpoint_error_comes_out_of_a_mangled_manifest(tmp_path: Path) -> None:
    text = (tiny(tmp_path) / "MANIFEST.json").read_text()
    values: list[Any] = [None, -1, 1 << 80, 1.5, "x", "", [], {}, [[]], True, "../../x", [1 << 62] * 16]
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        found = json.loads(text)
        for _ in range(rng.randint(1, 3)):
            mangle(found, rng, values)
        try:
            parse_manifest(sealed(found))
        except CheckpointError:
            refused += 1
    assert refused > 1000
    deep = b"[" * 100_000
    for junk in (b"", b"\n", b"{}", b"\0" * 100, deep):
        body = junk + b"\n"
        with pytest.raises(CheckpointError):
            parse_manifest(body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode())
        with pytest.raises(CheckpointError):
            parse_manifest(junk)


def mangle(found: Any, rng: random.Random, values: list[Any]) -> None:
    """Replace one thing somewhere in the tree."""
    while True:
        keys = list(found) if isinstance(found, dict) else list(range(len(found)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(found[key], dict | list) and rng.random() < 0.8:
            found = found[key]
            continue
        found[key] = copy.deepcopy(rng.choice(values))
        return


def test_a_header_length_that_lies_is_noticed(tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    path = folder / "model-r00000.safetensors"
    data = bytearray(path.read_bytes())
    data[3] = 0x7F  # a header of 2 GB
    path.write_bytes(data)
    assert "its header does not have the length" in problem(folder)
    assert "its header does not have the length" in problem(folder, "sha256")
