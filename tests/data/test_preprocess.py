"""Text to token files: the same from every format and with any number of workers; broken input leaves nothing."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.errors import ConfigError, DataError
from megatron_moe.data import preprocess as module
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.preprocess import PreprocessOptions, Progress, preprocess, read_fields
from megatron_moe.data.readers import Record
from megatron_moe.data.tokenizer import ByteTokenizer, TokenizerFiles

TEXTS = ["hello", "naïve\n\ncafé", "", "x" * 3000, "last \U0001f642"]
BYTES = TokenizerFiles("ByteTokenizer")


def jsonl(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def run(source: Path, output: Path, **changes: Any) -> tuple[Progress, list[str]]:
    skipped: list[str] = []
    options = PreprocessOptions(
        **{"inputs": (str(source),), "output_prefix": str(output), "tokenizer": BYTES, "append_eod": True, **changes}
    )
    return preprocess(options, report=lambda progress: None, skipped=skipped.append), skipped


def documents(prefix: str) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [
        np.concatenate([np.zeros(0, np.int64), *dataset.document(number)]).tolist()
        for number in range(dataset.num_documents)
    ]


EXPECTED = [[*text.encode(), 256] if text else [] for text in TEXTS]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_documents(kind: str, tmp_path: Path) -> None:
    path, lines = tmp_path / f"corpus.{kind}", jsonl(*({"text": text, "id": 1} for text in TEXTS))
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    else:
        compress: Any = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[kind]
        path.write_bytes(compress(lines))
    result, _ = run(path, tmp_path / "out")
    assert result.prefixes == (f"{tmp_path}/out_text_document",)
    assert documents(result.prefixes[0]) == EXPECTED
    assert (result.num_documents, result.num_tokens) == (5, sum(map(len, EXPECTED)))
    assert result.bytes_read == result.bytes_total == path.stat().st_size


def test_plain_text_gives_a_document_for_each_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_text("three")
    result, _ = run(tmp_path / "*.txt", tmp_path / "out")
    assert documents(result.prefixes[0]) == [[*b"one\n\ntwo", 256], [*b"three", 256]]
    result, _ = run(tmp_path / "a.txt", tmp_path / "lines", text_document="line", append_eod=False)
    assert documents(result.prefixes[0]) == [[*b"one"], [*b"two"]]


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_RECORDS", 7)
    draw = random.Random(1)
    records: list[object] = [{"text": "ab " * draw.randrange(50), "title": str(n)} for n in range(200)]
    records[37], records[150] = {"other": 1}, ["no object"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*records[:90]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(*records[90:]))
    for workers in (1, 2):
        result, skipped = run(
            tmp_path / "*.jsonl",
            tmp_path / f"w{workers}",
            workers=workers,
            json_keys=("text", "title"),
            on_error="skip",
        )
        assert (result.num_documents, result.num_skipped) == (198, 2)
        assert [message.partition(": ")[0] for message in skipped] == [
            f"{tmp_path}/a.jsonl, line 38",
            f"{tmp_path}/b.jsonl, line 61",
        ]
    for key in ("text", "title"):
        for suffix in (".bin", ".idx"):
            contents = {(tmp_path / f"w{workers}_{key}_document{suffix}").read_bytes() for workers in (1, 2)}
            assert len(contents) == 1
    assert len(documents(f"{tmp_path}/w1_title_document")) == 198


BROKEN = [
    (b'{"text": "a"', "not valid JSON"),
    (b'{"text": "a"}}', "not valid JSON"),
    (b"\xff\xfe\xfd", "not valid JSON"),
    (b'["a"]', "found a list"),
    (b'{"body": "a"}', "no key 'text' .keys here: 'body'"),
    (b'{"text": 1}', "is a int, not a text"),
    (b'{"text": null}', "is a NoneType"),
    (b'{"text": "\\ud800"}', "no valid Unicode"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"text": ' + b"9" * 10_000 + b"}", "not valid JSON"),
]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_line_is_named_and_leaves_nothing(workers: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "good"}) + b"\n{broken\n" + jsonl({"text": "good"}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: not valid JSON.*--on-error skip"):
        run(tmp_path / "a.jsonl", tmp_path / "out", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_every_kind_of_broken_line_is_told_apart(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "good"}) + line + b"\n" + jsonl({"text": "good"}))
    with pytest.raises(DataError, match=message) as error:
        run(tmp_path / "a.jsonl", tmp_path / "out")
    assert len(str(error.value)) < 1000
    result, skipped = run(tmp_path / "a.jsonl", tmp_path / "out", on_error="skip")
    assert result.num_skipped == len(skipped) == 1 and result.num_documents == 2
    assert f"{tmp_path}/a.jsonl, line 2: " in skipped[0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(line=st.binary(max_size=60) | st.text(alphabet='{}[]":,\\ utext01d8', max_size=30).map(str.encode))
def test_any_bytes_are_a_document_or_a_data_error(line: bytes) -> None:
    try:
        texts = read_fields(Record("a.jsonl", 1, "line", line), ["text"])
    except DataError:
        return
    assert [type(text) for text in texts] == [str]
    ByteTokenizer().encode(texts[0])


def test_max_documents_counts_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}, 1, {"text": "b"}, {"text": "c"}, 2))
    result, skipped = run(tmp_path / "a.jsonl", tmp_path / "out", on_error="skip", max_documents=2)
    assert documents(result.prefixes[0]) == [[97, 256], [98, 256]]
    assert result.num_skipped == len(skipped) == 1
    # what comes after the last document is not looked at
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": "a"}, 1))
    run(tmp_path / "b.jsonl", tmp_path / "stop", max_documents=1)


def test_ids_are_stored_in_the_type_of_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("5 69999")
    result, _ = run(tmp_path / "a.txt", tmp_path / "out", tokenizer=TokenizerFiles("NullTokenizer", vocab_size=70000))
    assert documents(result.prefixes[0]) == [[5, 69999, 69999]]
    assert IndexedDataset(result.prefixes[0]).dtype == np.int32
    (tmp_path / "b.txt").write_text("5 x")
    with pytest.raises(DataError, match="b.txt, line 1: .*'x'"):
        run(tmp_path / "b.txt", tmp_path / "x", tokenizer=TokenizerFiles("NullTokenizer", vocab_size=70000))


def test_existing_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a", "title": "b"}))
    run(tmp_path / "a.jsonl", tmp_path / "out", json_keys=("title",))
    with pytest.raises(ConfigError, match="out_title_document.bin.*--overwrite"):
        run(tmp_path / "a.jsonl", tmp_path / "out", json_keys=("text", "title"))
    assert not (tmp_path / "out_text_document.bin.partial").exists()
    run(tmp_path / "a.jsonl", tmp_path / "out", json_keys=("text", "title"), overwrite=True)
    assert documents(f"{tmp_path}/out_text_document") == [[97, 256]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "--workers"),
        ({"max_documents": 0}, "--max-documents"),
        ({"json_keys": ("text", "text")}, "names a key twice"),
        ({"json_keys": ("text", "title")}, "plain text has one field"),
        ({"inputs": ("missing.jsonl",)}, "names no file"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "a.txt", tmp_path / "out", **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_input_without_any_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n \n")
    with pytest.raises(DataError, match="holds no document"):
        run(tmp_path / "a.jsonl", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
