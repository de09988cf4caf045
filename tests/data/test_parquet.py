"""A small Parquet file that unpacks to far more than memory is refused, or read a few rows at a time."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_moe.config.errors import DataError
from megatron_moe.data import parquet
from megatron_moe.data.parquet import read_rows
from megatron_moe.data.readers import RecordReader

MIB = 1 << 20


def written(path: Path, texts: list[str], **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path, **options)
    return path


def test_rows_come_in_order_over_groups(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", [f"text {number}" for number in range(1000)], row_group_size=300)
    assert [row and row["text"] for row in read_rows(path, ["text"], longest=100)] == [f"text {n}" for n in range(1000)]


def test_a_group_that_unpacks_to_too_much_is_refused_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "bomb.parquet", ["a" * 64 * MIB], compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 32 * MIB)
    before = pyarrow.default_memory_pool().max_memory()
    with pytest.raises(DataError, match=r"column 'text' unpacks from [\d,]+ to [\d,]+ bytes in group 0 .* smaller"):
        list(RecordReader([path], keys=["text"]))
    assert pyarrow.default_memory_pool().max_memory() - before < 16 * MIB
    # a column that nobody asks for is not unpacked
    assert [record.content for record in RecordReader([path], keys=["id"])] == [{"id": 0}]


@pytest.mark.parametrize("options", [{"use_dictionary": True}, {"use_dictionary": False, "delta": True}])
def test_a_value_stored_once_for_many_rows_is_not_unpacked_for_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    more = {"column_encoding": {"text": "DELTA_BYTE_ARRAY", "id": "PLAIN"}} if options.get("delta") else {}
    text = "b" * MIB
    path = written(
        tmp_path / "a.parquet", [text] * 200, compression="zstd", use_dictionary=options["use_dictionary"], **more
    )
    stored = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1).total_uncompressed_size
    assert stored < 8 * MIB and path.stat().st_size < 100_000
    monkeypatch.setattr(parquet, "MAX_UNPACKED_BYTES", 8 * MIB)
    reader = pyarrow.parquet.ParquetFile.iter_batches
    sizes: list[int] = []

    def watched(*arguments: object, **named: object) -> object:
        for batch in reader(*arguments, **named):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watched)
    rows = list(read_rows(path, ["text"], longest=2 * MIB))
    assert len(rows) == 200 and all(row == {"text": text} for row in rows)
    assert max(sizes) <= 9 * MIB


def test_a_text_that_is_too_long_is_named_and_its_neighbours_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", ["one", "x" * 17, "é" * 9, "four"])
    assert [row and row["text"] for row in read_rows(path, ["text"], longest=16)] == ["one", None, None, "four"]


def test_a_long_row_becomes_a_record_with_its_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_moe.data.readers.MAX_LINE_BYTES", 16)
    path = written(tmp_path / "a.parquet", ["one", "x" * 17])
    good, bad = RecordReader([path], keys=["text"])
    assert (good.content, good.problem) == ({"text": "one"}, "")
    assert bad.content is None and "longer than 16 bytes" in bad.problem and bad.place.endswith("row 2")


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="is no Parquet file or is damaged"):
        list(read_rows(path, ["text"], longest=10))
