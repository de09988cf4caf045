"""Documents from every kind of file, with their places; damage is named."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_moe.config.errors import ConfigError, DataError
from megatron_moe.data import readers
from megatron_moe.data.readers import Record, RecordReader, TextUnit, find_inputs

LINES = b'{"text": "one"}\n\n{"text": "two"}\n  \n{"text": "three"}'


def read(path: Path, **options: Any) -> list[Record]:
    return list(RecordReader([path], **{"keys": ["text"], **options}))


def compress(content: bytes, suffix: str) -> bytes:
    return {"": lambda: content, ".gz": lambda: gzip.compress(content), ".zst": lambda: zstandard.compress(content)}[
        suffix
    ]()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_come_with_their_numbers_and_blank_ones_are_left_out(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(LINES, suffix))
    records = read(path)
    assert [(record.number, record.content) for record in records] == [
        (1, b'{"text": "one"}\n'), (3, b'{"text": "two"}\n'), (5, b'{"text": "three"}'),
    ]  # fmt: skip
    assert records[1].place == f"{path}, line 3"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_files_of_several_compressed_parts_are_read_whole(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    parts = [f'{{"text": "{"word " * 2000}{n}"}}\n'.encode() for n in range(20)]
    path.write_bytes(b"".join(compress(part, suffix) for part in parts))
    assert [record.content for record in read(path)] == parts


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [10, 0.5, -1])
def test_compressed_files_cut_anywhere_are_refused(suffix: str, cut: float, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = compress(b"".join(f'{{"text": "{n * 7919}"}}\n'.encode() for n in range(1000)), suffix)
    path.write_bytes(whole[: int(cut * len(whole)) if cut == 0.5 else int(cut)])
    with pytest.raises(DataError, match=r"a\.jsonl.* is damaged or cut short"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_files_that_are_not_compressed_at_all_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(LINES)
    with pytest.raises(DataError, match="damaged"):
        read(path)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", [(1, "a b\nc\n\n\n d\r\n")]),
        ("paragraph", [(1, "a b\nc\n"), (5, " d\r\n")]),
        ("line", [(1, "a b"), (2, "c"), (5, " d")]),
    ],
)
def test_text_is_cut_into_documents_as_asked(unit: TextUnit, expected: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a b\nc\n\n\n d\r\n")
    found = [(record.number, record.content) for record in read(path, keys=["body"], text_unit=unit)]
    assert found == [(number, {"body": text}) for number, text in expected]


def test_text_that_is_not_utf8_is_a_problem_of_its_record(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\xff bad\ngood\n")
    records = read(path, text_unit="line")
    assert [record.content is None for record in records] == [False, True, False]
    assert "not UTF-8" in records[1].problem and records[1].place.endswith("a.txt, line 2")


def test_a_line_longer_than_the_limit_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 16)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n' + b"x" * 100 + b'\n{"text": "2"}\n')
    records = read(path)
    assert [(record.number, record.content is None) for record in records] == [(1, False), (2, True), (3, False)]
    assert "longer than 16 bytes" in records[1].problem


def test_rows_of_parquet_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", None]}), path)
    assert [(record.place, record.content) for record in read(path)] == [
        (f"{path}, row 1", {"text": "one"}), (f"{path}, row 2", {"text": None}),
    ]  # fmt: skip
    with pytest.raises(DataError, match="no column 'body'.*it has: id, text"):
        read(path, keys=["body"])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="no Parquet file or is damaged"):
        read(path)


def test_the_position_runs_to_the_end_of_all_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    reader = RecordReader([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], keys=["text"])
    positions = [reader.position for _ in reader]
    assert positions == sorted(positions) and reader.position == reader.num_bytes == 2 * len(LINES)


def test_patterns_are_sorted_and_unknown_kinds_refused(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "d.csv"):
        (tmp_path / name).write_text("x")
    found = find_inputs([str(tmp_path / "c.txt"), str(tmp_path / "*.jsonl")])
    assert [path.name for path in found] == ["c.txt", "a.jsonl", "b.jsonl"]
    with pytest.raises(ConfigError, match=r"d\.csv is of no kind.*\.jsonl"):
        find_inputs([str(tmp_path / "d.csv")])
    with pytest.raises(ConfigError, match="names no file"):
        find_inputs([str(tmp_path / "*.parquet")])
