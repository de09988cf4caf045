"""Reading token files: Megatron's golden pairs, and every way in which a pair can be broken."""

import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.config.errors import DataError
from megatron_moe.config.optional import require
from megatron_moe.data import indexed_dataset
from megatron_moe.data.indexed_dataset import IndexedDataset, token_dtype
from megatron_moe.data.indexed_writer import IndexedDatasetWriter

GOLDEN = Path(__file__).parent / "golden"
CORPORA: Any = json.loads((GOLDEN / "corpora.json").read_text())
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10]]


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> Path:
    with IndexedDatasetWriter(prefix, dtype=np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()
    return prefix


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Without hashes, as Megatron writes it."""
    prefix = write(tmp_path / "corpus", DOCUMENTS)
    Path(f"{prefix}.hashes.json").unlink()
    return prefix


@pytest.fixture
def megatron() -> ModuleType:
    try:
        return require("megatron.core.datasets.indexed_dataset", extra="none")
    except Exception as error:  # its import runs much of the package: whatever fails, the golden files remain
        pytest.skip(f"megatron-core cannot be imported: {error}")


def change(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize("name", CORPORA)
def test_pairs_that_megatron_wrote_are_read(name: str) -> None:
    dataset = IndexedDataset(GOLDEN / name)
    documents = [[sequence.tolist() for sequence in dataset.document(n)] for n in range(dataset.num_documents)]
    assert documents == CORPORA[name]["documents"]
    assert dataset.dtype == np.dtype(CORPORA[name]["dtype"])
    flat = [token for document in CORPORA[name]["documents"] for sequence in document for token in sequence]
    assert dataset.tokens(0, dataset.num_tokens).tolist() == flat


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CORPORA)
def test_megatron_reads_what_is_written_here(name: str, tmp_path: Path, megatron: ModuleType) -> None:
    with IndexedDatasetWriter(tmp_path / name, dtype=np.dtype(CORPORA[name]["dtype"])) as writer:
        for document in CORPORA[name]["documents"]:
            writer.add_document([token for part in document for token in part], [len(part) for part in document])
        writer.finish()
    theirs = megatron.IndexedDataset(str(tmp_path / name))
    bounds = theirs.document_indices.tolist()
    read = [[theirs[n].tolist() for n in range(a, b)] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert read == CORPORA[name]["documents"]


@pytest.mark.filterwarnings("ignore")
def test_what_the_installed_megatron_writes_is_read(tmp_path: Path, megatron: ModuleType) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = write(tmp_path / "ours", DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert [part.tolist() for n in range(4) for part in IndexedDataset(tmp_path / "theirs").document(n)] == DOCUMENTS


def test_token_type_changes_at_65500_as_in_megatron() -> None:
    assert [token_dtype(size) for size in (257, 65499, 65500, 65536)] == [np.uint16, np.uint16, np.int32, np.int32]


def test_an_empty_corpus_opens(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "empty", []))
    assert (dataset.num_sequences, dataset.num_documents, dataset.num_tokens) == (0, 0, 0)
    assert dataset.tokens(0, 5).size == 0


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", "no Megatron index.*MMIDIDX"),
        (7, b"\x01", "no Megatron index"),
        (9, struct.pack("<Q", 2), "index version 2"),
        (17, b"\x00", "dtype code 0 .unknown"),
        (17, b"\x07", "dtype code 7 .float32"),
        (17, b"\x04", "has 20 bytes, but corpus.idx describes 24"),
        (18, struct.pack("<Q", 3), "needs 110"),
        (18, struct.pack("<Q", 2**63), "cut short or damaged"),
        (26, struct.pack("<Q", 0), "cut short or damaged"),
        (34, struct.pack("<i", 2), "sequence 0 has 2 tokens from byte 0"),
        (38, struct.pack("<i", -1), "sequence 1 has -1 tokens"),
        (46, struct.pack("<i", 3), "has 20 bytes, but corpus.idx describes 22"),
        (50, struct.pack("<q", 2), "sequence 0"),
        (58, struct.pack("<q", 8), "sequence 0"),
        (82, struct.pack("<q", 1), "must run from 0 to 4"),
        (90, struct.pack("<q", 3), "document 1 starts at sequence 3 but ends at 2"),
        (114, struct.pack("<q", 5), "must run from 0 to 4"),
    ],
)
def test_a_damaged_index_is_refused_by_name(pair: Path, offset: int, value: bytes, message: str) -> None:
    change(Path(f"{pair}.idx"), offset, value)
    with pytest.raises(DataError, match=message) as error:
        IndexedDataset(pair)
    assert "corpus" in str(error.value) and "tools/preprocess_data.py" in str(error.value)


def test_an_index_cut_at_any_byte_is_refused(pair: Path) -> None:
    path = Path(f"{pair}.idx")
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            IndexedDataset(pair)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError):
        IndexedDataset(pair)


def test_tokens_cut_at_any_byte_are_refused(pair: Path) -> None:
    path = Path(f"{pair}.bin")
    whole = path.read_bytes()
    for size in [*range(len(whole)), len(whole) + 1]:
        path.write_bytes((whole + b"\0")[:size])
        with pytest.raises(DataError, match=f"has {size} bytes, but corpus.idx describes 20"):
            IndexedDataset(pair)


def test_every_flipped_bit_before_the_document_table_is_found(pair: Path) -> None:
    path = Path(f"{pair}.idx")
    whole = path.read_bytes()
    for bit in range(8 * (34 + 12 * 4)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError):
            IndexedDataset(pair)


def test_modes_of_a_multimodal_set_are_refused_by_name(pair: Path) -> None:
    path = Path(f"{pair}.idx")
    path.write_bytes(path.read_bytes() + b"\0" * 4)
    with pytest.raises(DataError, match="multimodal"):
        IndexedDataset(pair)


def test_a_missing_pair_is_told_with_what_is_there(pair: Path) -> None:
    with pytest.raises(DataError, match="corp.idx.*not found.*there is: .*corpus"):
        IndexedDataset(pair.with_name("corp"))
    Path(f"{pair}.bin").unlink()
    with pytest.raises(DataError, match="corpus.bin not found"):
        IndexedDataset(pair)


def test_a_corpus_cut_while_it_is_open_is_told(pair: Path) -> None:
    dataset = IndexedDataset(pair)
    Path(f"{pair}.bin").write_bytes(b"1234")
    assert dataset.tokens(0, 2).size == 2
    with pytest.raises(DataError, match="became shorter while it was read"):
        dataset.tokens(0, 5)


def test_reading_beyond_the_end_gives_what_there_is(pair: Path) -> None:
    assert IndexedDataset(pair).tokens(8, 100).tolist() == [9, 10]
    assert IndexedDataset(pair).tokens(20, 30).size == 0


def test_large_indexes_are_checked_where_they_are_read(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(Path(f"{pair}.idx"), 34, struct.pack("<i", 2))
    monkeypatch.setattr(indexed_dataset, "CHECK_ON_OPEN", 3)
    dataset = IndexedDataset(pair)
    assert not dataset.verified
    with pytest.raises(DataError, match="sequence 0"):
        dataset.verify_index()
    with pytest.raises(DataError, match="sequence 0"):
        dataset.verify_sequences(0, 1)
    dataset.verify_sequences(1, 4)


def test_checks_in_pieces_see_what_lies_between_the_pieces(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_dataset, "CHUNK", 2)
    IndexedDataset(pair)
    change(Path(f"{pair}.idx"), 34 + 4, struct.pack("<i", 2))  # the last sequence of the first piece
    with pytest.raises(DataError, match="sequence 1 has 2 tokens"):
        IndexedDataset(pair)


def test_the_fingerprint_follows_the_content(pair: Path, tmp_path: Path) -> None:
    same, other = write(tmp_path / "same", DOCUMENTS), write(tmp_path / "other", [[1, 2], *DOCUMENTS[1:]])
    prints = [IndexedDataset(prefix).fingerprint() for prefix in (pair, same, other)]
    assert prints[0] == prints[1] != prints[2]
