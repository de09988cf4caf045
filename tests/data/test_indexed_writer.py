"""Writing token files: Megatron's bytes, whole pairs or nothing."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.config.errors import ConfigError, DataError, StorageError
from megatron_moe.data import indexed_writer
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.indexed_writer import IndexedDatasetWriter, merge

GOLDEN = Path(__file__).parent / "golden"
CORPORA: Any = json.loads((GOLDEN / "corpora.json").read_text())
UINT16 = np.dtype(np.uint16)
WHOLE = {"corpus.bin", "corpus.idx", "corpus.hashes.json"}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write(prefix: Path, documents: list[list[int]], *, overwrite: bool = False) -> None:
    with IndexedDatasetWriter(prefix, dtype=UINT16, overwrite=overwrite) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()


@pytest.mark.parametrize("name", CORPORA)
def test_bytes_are_those_of_megatron(name: str, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / name, dtype=np.dtype(CORPORA[name]["dtype"])) as writer:
        for document in CORPORA[name]["documents"]:
            writer.add_document([token for part in document for token in part], [len(part) for part in document])
        writer.finish()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"{name}{suffix}").read_bytes() == (GOLDEN / f"{name}{suffix}").read_bytes()
    assert files(tmp_path) == {f"{name}.bin", f"{name}.idx", f"{name}.hashes.json"}


def test_many_documents_at_once_equal_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[1, 2], [], [3], [4, 5, 6], []]
    write(tmp_path / "one", documents)
    monkeypatch.setattr(indexed_writer, "OFFSETS_AT_ONCE", 2)
    with IndexedDatasetWriter(tmp_path / "many", dtype=UINT16) as writer:
        writer.add_documents(np.array([1, 2, 3]), np.array([2, 0, 1]))
        writer.add_documents(np.array([4, 5, 6]), np.array([3, 0]))
        assert (writer.num_documents, writer.num_sequences, writer.num_tokens) == (5, 3, 6)
        writer.finish()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(tmp_path / "corpus", dtype=UINT16) as writer:
        writer.add_document([1, 2, 3])
        raise KeyboardInterrupt
    assert files(tmp_path) == set()


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    write(tmp_path / "corpus", [[1]])
    with pytest.raises(ConfigError, match=r"corpus\.bin.*--overwrite"):
        write(tmp_path / "corpus", [[2]])
    assert IndexedDataset(tmp_path / "corpus").sequence(0).tolist() == [1]
    write(tmp_path / "corpus", [[2]], overwrite=True)
    assert IndexedDataset(tmp_path / "corpus").sequence(0).tolist() == [2]


def test_a_failed_overwrite_keeps_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path / "corpus", [[1]])
    with pytest.raises(DataError), IndexedDatasetWriter(tmp_path / "corpus", dtype=UINT16, overwrite=True) as writer:
        writer.add_document([2])
        writer.add_document([70000])
    assert IndexedDataset(tmp_path / "corpus").sequence(0).tolist() == [1]
    assert files(tmp_path) == WHOLE


@pytest.mark.parametrize("token", [-1, 65536])
def test_ids_that_do_not_fit_are_refused(token: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="uint16"), IndexedDatasetWriter(tmp_path / "corpus", dtype=UINT16) as writer:
        writer.add_document([1, token])


def test_two_writers_of_one_corpus_do_not_mix(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus", dtype=UINT16) as first:
        first.add_document([1])
        with pytest.raises(ConfigError, match="another process is writing"):
            write(tmp_path / "corpus", [[2]])
        first.finish()
    assert IndexedDataset(tmp_path / "corpus").sequence(0).tolist() == [1]


def test_a_killed_writer_publishes_nothing_and_hinders_nobody(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, numpy\n"
        "from megatron_moe.data.indexed_writer import IndexedDatasetWriter\n"
        "writer = IndexedDatasetWriter(sys.argv[1], dtype=numpy.dtype('uint16'))\n"
        "writer.add_documents(numpy.arange(50000), numpy.array([50000]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "corpus"], env=environment).returncode == -9
    assert not files(tmp_path) & WHOLE
    write(tmp_path / "corpus", [[7]])
    assert IndexedDataset(tmp_path / "corpus").sequence(0).tolist() == [7]
    assert files(tmp_path) == WHOLE


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(indexed_writer, "_sync", full)
    with pytest.raises(StorageError, match="No space left"):
        write(tmp_path / "corpus", [[1]])
    assert files(tmp_path) == set()


def test_merged_corpora_hold_all_documents_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_writer, "COPY_TOKENS", 2)
    write(tmp_path / "a", [[1, 2, 3], []])
    write(tmp_path / "b", [[4], [5, 6]])
    assert merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "all")) == 4
    write(tmp_path / "expected", [[1, 2, 3], [], [4], [5, 6]])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"all{suffix}").read_bytes() == (tmp_path / f"expected{suffix}").read_bytes()


def test_corpora_of_different_token_types_do_not_merge(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1]])
    with pytest.raises(DataError, match="int32.*uint16"):
        merge([str(tmp_path / "a"), str(GOLDEN / "megatron_int32")], str(tmp_path / "all"))
    assert files(tmp_path) == {"a.bin", "a.idx", "a.hashes.json"}
    with pytest.raises(ConfigError, match="one of the inputs"):
        merge([str(tmp_path / "a")], str(tmp_path / "a"), overwrite=True)


def test_merging_keeps_the_tokenizer_that_all_share_and_refuses_two(tmp_path: Path) -> None:
    for name, made in (("a", "x"), ("b", "x"), ("unknown", ""), ("other", "y")):
        with IndexedDatasetWriter(tmp_path / name, dtype=UINT16, tokenizer=made) as writer:
            writer.add_document([1, 2])
            writer.finish()
    prefixes = {name: str(tmp_path / name) for name in ("a", "b", "unknown", "other")}
    merge([prefixes["a"], prefixes["b"]], str(tmp_path / "same"))
    assert IndexedDataset(tmp_path / "same").tokenizer_fingerprint() == "x"
    merge([prefixes["a"], prefixes["unknown"]], str(tmp_path / "half"))
    assert IndexedDataset(tmp_path / "half").tokenizer_fingerprint() is None
    with pytest.raises(ConfigError, match="/a was made with a tokenizer of fingerprint x, .*/other with y"):
        merge([prefixes["b"], prefixes["a"], prefixes["other"]][1:], str(tmp_path / "two"))
    assert not list(tmp_path.glob("two*"))


def test_a_pair_that_was_published_by_half_is_taken_over_and_a_foreign_file_is_not(tmp_path: Path) -> None:
    write(tmp_path / "corpus", [[1]])
    (tmp_path / "corpus.idx").unlink()
    with pytest.raises(ConfigError, match="already there"):
        write(tmp_path / "corpus", [[2]])
    (tmp_path / "corpus.idx.partial").touch()  # as of a writer that was killed between its two renames
    write(tmp_path / "corpus", [[2]])
    assert IndexedDataset(tmp_path / "corpus").sequence(0).tolist() == [2]
    assert files(tmp_path) == WHOLE
