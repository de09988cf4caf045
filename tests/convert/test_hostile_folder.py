"""A model's folder from a stranger: no code of it runs, nothing is fetched, broken files end in our errors."""

import json
import os
import random
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from goals import Trials
from safetensors.torch import save_file

from megatron_moe.config.errors import CheckpointError, DataError, MegatronMoEError
from megatron_moe.convert import hf_folder
from megatron_moe.convert.hf_folder import HfFolder, read_json
from megatron_moe.convert.import_ import import_folder
from tests.convert.samples import library_model

HEADER_LIMIT = 100_000_000
WORDS = [
    b'"shape":', b'"dtype":"F32"', b'"data_offsets":[0,8]', b"-1", b"1e400", b"NaN", b"18446744073709551615", b"null",
    b"{}", b"[[[[", b'"__metadata__":{"a":1}', b'"../../etc/passwd"', b"\\u0000", b"\xff", b"9" * 400, b'"F4"',
    b'"a":{', b'""',
]  # fmt: skip


def read_all(folder: Path) -> int:
    """Everything that a folder gives; how many numbers that were."""
    source = HfFolder(folder)
    total = 0
    for name in source.names():
        source.dtype(name)
        shape = source.shape(name)
        tensor = source.read(name)
        assert tuple(tensor.shape) == shape
        total += tensor.numel()
    return total


def mutated(whole: bytes, draw: random.Random) -> bytes:
    """The header's length, the header or the end of a file changed; most stay JSON of some kind."""
    length = int.from_bytes(whole[:8], "little")
    header, body = bytearray(whole[8 : 8 + length]), whole[8 + length :]
    kind = draw.randrange(6)
    if kind == 0:
        wrong = draw.choice([0, 1, length - 1, length + 1, 2**63, 2**64 - 1, draw.randrange(2**64)])
        return wrong.to_bytes(8, "little") + whole[8:]
    if kind == 1:
        return whole[: draw.randrange(len(whole))]
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(header) + 1)
        if kind == 2 and at < len(header):
            header[at] ^= 1 << draw.randrange(8)
        elif kind == 3:
            header[at : at + draw.randint(0, 12)] = draw.choice(WORDS)
        elif kind == 4:
            header[at:at] = header[draw.randrange(len(header)) :][: draw.randint(1, 40)]
        else:
            digits = [place for place, byte in enumerate(header) if 48 <= byte < 58]
            header[draw.choice(digits)] = draw.randrange(48, 58)
    return len(header).to_bytes(8, "little") + bytes(header) + body


@pytest.mark.timeout(7200)
@pytest.mark.goal("R35", ci=10_000, nightly=1_000_000, what="safetensors headers mutated: refused, in bounded memory")
def test_mutated_headers_are_read_or_refused_in_bounded_memory(tmp_path: Path, trials: Trials) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16), "d": torch.zeros(1, 1)}
    path = tmp_path / hf_folder.SINGLE
    save_file(tensors, path, metadata={"format": "pt"})
    whole, draw, refused = path.read_bytes(), random.Random(11 + trials.seed), 0
    assert read_all(tmp_path) == 11
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with path.open("r+b", buffering=0) as file:
        for _ in range(trials.wanted):
            changed = mutated(whole, draw)
            os.pwrite(file.fileno(), changed, 0)
            os.ftruncate(file.fileno(), len(changed))
            try:
                # what is read lies within the file
                assert read_all(tmp_path) <= len(whole)
            except MegatronMoEError as error:
                assert str(tmp_path) in str(error)
                refused += 1
    assert refused > 0.6 * trials.wanted
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    trials.add(trials.wanted)


def test_a_header_larger_than_any_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / hf_folder.SINGLE).open("wb") as file:
        file.write((HEADER_LIMIT + 1).to_bytes(8, "little"))
        os.truncate(file.fileno(), 2 * HEADER_LIMIT)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="cannot be read"):
        HfFolder(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


ELSEWHERE = ["../out.safetensors", "/etc/passwd", "..", ".", "a/b", "", "a\0b", "none", 5, None, ["x"]]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_leads_to_no_file_elsewhere(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "out.safetensors")
    (folder / hf_folder.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(MegatronMoEError):
        HfFolder(folder)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b"", b"[]", b'{"a": 1', b'"\\ud800"', b"9" * 5000]
)
def test_json_that_is_none_is_a_data_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DataError):
        read_json(tmp_path / "config.json")
    with pytest.raises(MegatronMoEError):
        import_folder(tmp_path, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists() or not list((tmp_path / "ckpt").iterdir())


def test_endless_json_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_folder, "JSON_LIMIT_BYTES", 1000)
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="more than 1,000 bytes"):
        read_json(tmp_path / "config.json")


CODE = """
from pathlib import Path
Path({sentinel!r}).touch()
class Model: ...
"""


@pytest.mark.goal("R36", ci=1, nightly=1, what="a model folder with code of its own: none runs, nothing is fetched")
def test_an_import_runs_no_code_of_the_folder_and_opens_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials
) -> None:
    folder, sentinel = tmp_path / "model", tmp_path / "sentinel"
    library_model("mixtral").save_pretrained(folder)
    plain = import_folder(folder, tmp_path / "plain")
    for name in ("modeling_evil", "configuration_evil", "setup", "__init__", "conftest", "sitecustomize"):
        (folder / f"{name}.py").write_text(CODE.format(sentinel=str(sentinel)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {
            "AutoConfig": "configuration_evil.Model",
            "AutoModelForCausalLM": "modeling_evil.Model",
            "AutoTokenizer": ["stranger/repository--modeling_evil.Model", None],
        },
        "trust_remote_code": True,
        "_attn_implementation_internal": "stranger/kernels:evil",
        "_name_or_path": "stranger/repository",
        "custom_pipelines": {"evil": {"impl": "modeling_evil.Model"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"auto_map": config["auto_map"], "trust_remote_code": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert import_folder(folder, tmp_path / "ckpt").to_dict() == plain.to_dict()
    assert not sentinel.exists()
    trials.add(1)
