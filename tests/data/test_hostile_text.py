"""Text, names and archives made to break preprocessing: documents or named problems, in bounded memory, never half."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from goals import Trials

from megatron_moe.config.errors import ConfigError, DataError, MegatronMoEError
from megatron_moe.data import preprocess as module
from megatron_moe.data import readers
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.indexed_writer import IndexedDatasetWriter, merge
from megatron_moe.data.preprocess import PreprocessOptions, Progress, preprocess
from megatron_moe.data.tokenizer import TokenizerFiles
from tests.house.sources import ROOT

BYTES = TokenizerFiles("ByteTokenizer")

# pieces of lines that each break something somewhere
PIECES = [
    b'{"text": "', b'{"text"', b'"}', b"}", b"[", b"]", b'"', b": ", b",", b"\\", b"\\u0000", b"\\ud800", b"\\udc00",
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xc3", b"\xf0\x9f\x99", b"\xef\xbb\xbf", b"NaN", b"Infinity", b"-1e999", b"null",
    b"true", b"1", b"9" * 4400, b'"text": ', b'"x": ', b"a b", b"\r", b"\t", b"\x1a", b"[" * 3000, b'{"a":' * 1500,
    b"\xe2\x80\xa8",
]  # fmt: skip
GOOD = b'{"text": "good"}'


def hostile_lines(count: int, seed: int) -> list[bytes]:
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        if draw.random() < 0.2:
            lines.append(GOOD)
        elif draw.random() < 0.5:
            changed = bytearray(json.dumps({"text": "the text", "n": draw.random()}).encode())
            for _ in range(draw.randint(1, 3)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            lines.append(bytes(changed))
        else:
            lines.append(b"".join(draw.choices(PIECES, k=draw.randint(1, 5))))
    return [line.replace(b"\n", b" ") for line in lines]


def run(source: Path, output: Path, **changes: Any) -> tuple[Progress, list[str]]:
    skipped: list[str] = []
    given = {"inputs": (str(source),), "output_prefix": str(output), "tokenizer": BYTES, "on_error": "skip", **changes}
    return preprocess(PreprocessOptions(**given), report=lambda progress: None, skipped=skipped.append), skipped


def content(folder: Path, name: str) -> list[bytes]:
    return [(folder / f"{name}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx", ".hashes.json")]


@pytest.mark.timeout(7200)
@pytest.mark.goal(
    "R32", ci=10_000, nightly=1_000_000, what="hostile JSON lines: documents or named, the same for 1 and 3 workers"
)
def test_hostile_lines_are_documents_or_named_whatever_the_workers(tmp_path: Path, trials: Trials) -> None:
    lines = hostile_lines(trials.wanted, seed=5 + trials.seed)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    one, told = run(tmp_path / "a.jsonl", tmp_path / "w1")
    blank = sum(not line.strip() for line in lines)
    assert one.num_documents + one.num_skipped + blank == len(lines)
    assert one.num_documents >= lines.count(GOOD) > 0.15 * len(lines)
    assert one.num_skipped == len(told) > 0.5 * len(lines)
    numbers = [int(message.removeprefix(f"{tmp_path}/a.jsonl, line ").partition(":")[0]) for message in told]
    assert numbers == sorted(set(numbers))
    assert all(message.isprintable() and len(message) < 600 for message in told)
    three, told_again = run(tmp_path / "a.jsonl", tmp_path / "w3", workers=3)
    assert told_again == told and three.num_documents == one.num_documents
    assert content(tmp_path, "w1") == content(tmp_path, "w3")
    assert not list(tmp_path.glob("*.partial"))
    trials.add(len(lines))


def test_a_line_of_ten_megabytes_is_a_document_and_a_longer_one_than_allowed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 10_000_000 + b'"}\n' + GOOD + b"\n")
    result, told = run(path, tmp_path / "whole")
    assert (result.num_documents, result.num_tokens, told) == (2, 10_000_004, [])
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    result, told = run(path, tmp_path / "cut")
    assert result.num_documents == 1 and "line 1: longer than 1048576 bytes" in told[0]


def test_what_json_allows_is_taken_as_megatron_takes_it(tmp_path: Path) -> None:
    lines = [b'{"text": "a", "text": "b"}', b'{"text": "c", "score": NaN, "n": -Infinity}', b'{"text": "d\\u0000"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    result, told = run(tmp_path / "a.jsonl", tmp_path / "out")
    dataset = IndexedDataset(result.prefixes[0])
    assert [bytes(dataset.sequence(number).tolist()) for number in range(3)] == [b"b", b"c", b"d\0"] and told == []


KILLED = """
import os, signal, sys
from megatron_moe.data import preprocess as module
from megatron_moe.data.preprocess import PreprocessOptions
from megatron_moe.data.tokenizer import TokenizerFiles
module.BATCH_RECORDS = 50
left = int(sys.argv[3])
def report(progress):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
module.preprocess(
    PreprocessOptions(
        inputs=(sys.argv[1],), output_prefix=sys.argv[2], tokenizer=TokenizerFiles("ByteTokenizer"), on_error="skip"
    ),
    report=report,
    skipped=lambda problem: None,
)
"""


def test_a_killed_run_shows_nothing_and_the_next_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(hostile_lines(500, seed=6)))
    run(tmp_path / "a.jsonl", tmp_path / "undisturbed")
    for batches in (1, 4, 9):
        command = [sys.executable, "-c", KILLED, tmp_path / "a.jsonl", tmp_path / "killed", str(batches)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -signal.SIGKILL
        assert {path.name for path in tmp_path.glob("killed*")} <= {
            f"killed_text_document{suffix}.partial" for suffix in (".bin", ".idx")
        }
    run(tmp_path / "a.jsonl", tmp_path / "killed")
    assert content(tmp_path, "killed") == content(tmp_path, "undisturbed")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
@pytest.mark.goal("R37", ci=1, nightly=1, what="archives made to unpack to more than memory: named, in bounded memory")
def test_text_made_to_unpack_to_more_than_memory_is_named(
    unit: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    plain = (b"x" * 100 + (b"\n" if unit == "paragraph" else b" ")) * 400_000  # 40 MB in 40 to 150 kB
    compressed = gzip.compress(plain, 5) if suffix == ".gz" else zstandard.compress(plain)
    assert len(compressed) < len(plain) / 100
    (tmp_path / f"a.txt{suffix}").write_bytes(compressed)
    sizes = peak_reads(monkeypatch)
    with pytest.raises(DataError, match=r"line 1: longer than 1048576 bytes"):
        run(tmp_path / f"a.txt{suffix}", tmp_path / "out", text_document=unit, on_error="stop")
    assert max(sizes) <= (1 << 20) + 1
    assert not list(tmp_path.glob("out*"))
    trials.add(1)


def peak_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is taken from a decompressed stream at once."""
    sizes = [0]
    plain = readers.uncompressed

    class Counted(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            found = super().read(size)
            sizes.append(len(found))
            return found

        def readline(self, size: int | None = -1, /) -> bytes:
            found = super().readline(size)
            sizes.append(len(found))
            return found

    monkeypatch.setattr(readers, "uncompressed", lambda path, file: Counted(plain(path, file).detach()))  # type: ignore[attr-defined]
    return sizes


@pytest.mark.goal("R37", ci=300, nightly=20_000, what="flipped and cut archives of text: read or named")
def test_flipped_archives_are_read_or_named(trials: Trials, tmp_path: Path) -> None:
    plain = b"\n".join([GOOD] * 30)
    archives = {".gz": gzip.compress(plain, mtime=0), ".zst": zstandard.compress(plain)}
    for number, draw in trials:
        suffix = (".gz", ".zst")[number % 2]
        changed = bytearray(archives[suffix])
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path = tmp_path / f"flipped.jsonl{suffix}"
        path.write_bytes(changed[: draw.randint(len(changed) // 2, len(changed))])
        try:
            list(readers.RecordReader([path], keys=["text"]))
        except MegatronMoEError:
            pass


NAMES = [
    "..", "../up", "a/../../up", "/", "/etc", "a\0b", "a\nb", "\n", " ", "", "-rf", "--help", "$(touch sentinel)",
    "`touch x`", ";touch x", "|x", "&x", ">x", "*", "?", "[a", "{a,b}", "~", "~root", "!!", "'", '"', "\\", "%s%n",
    "{0}", "\x1b[31m", "\x7f", "\u202e", "\ufeff", "e\u0301", "CON", "NUL", "a" * 300, "a/" * 3000, "é" * 200, "\udcff",
    "a.bin", "a.idx", "a\rb", "\t", "a\0", "\0", "..\\up", "....//", "file:///etc",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(NAMES)), ids=lambda number: ascii(NAMES[number])[:20])
@pytest.mark.goal("R37", ci=1, nightly=1, what="hostile names and keys: no path outside of the folder is touched")
def test_hostile_names_stay_names(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials
) -> None:
    name = NAMES[number]
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "in.jsonl").write_bytes(b'{"text": "a"}\n')
    monkeypatch.chdir(inside)
    for attempt in (
        lambda: IndexedDataset(f"in{name}"),
        lambda: merge([f"in{name}"], f"out{name}"),
        lambda: readers.find_inputs([f"none{name}"]),
        lambda: run(inside / "in.jsonl", inside / "key", json_keys=(name,)),
    ):
        with pytest.raises(MegatronMoEError):
            attempt()
    try:
        run(inside / "in.jsonl", Path("out"), output_prefix=f"out{name}/x")
    except MegatronMoEError:
        pass
    # only a prefix that itself leads out of the folder leads out of it
    if "/" not in name:
        assert [path.name for folder in (tmp_path, tmp_path / "a") for path in folder.iterdir()] == ["a", "b"]
    trials.add(1)


@pytest.mark.parametrize("key", ["../up", "/etc/x", "a/b", "", "a\0b", "a\nb"])
def test_a_key_does_not_become_a_path(key: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({key: "text"}))
    with pytest.raises(ConfigError, match="--json-keys.*would be part of a file name"):
        run(tmp_path / "in.jsonl", tmp_path / "out", json_keys=(key,))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_prefix_with_a_nul_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="NUL"):
        IndexedDatasetWriter(f"{tmp_path}/a\0b", dtype=module.token_dtype(10))
