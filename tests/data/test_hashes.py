"""Hashes beside a pair: every flipped bit and every cut of the three files is found; a bare pair is read as before."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from goals import Trials

from megatron_moe.config.errors import DataError
from megatron_moe.data import hashes
from megatron_moe.data.hashes import hashes_path, read_hashes
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.indexed_writer import IndexedDatasetWriter, merge
from tests.house.sources import ROOT
from tools import inspect_dataset

LENGTHS = [5, 17, 0, 40, 1, 9, 30, 22, 3, 60, 8, 41]
BLOCK = 128


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """.bin of 472 bytes in blocks of 128, .idx of 270 and hashes of 311: below 2 kB together."""
    monkeypatch.setattr(hashes, "BLOCK_BYTES", BLOCK)
    random = np.random.default_rng(3)
    with IndexedDatasetWriter(tmp_path / "corpus", dtype=np.dtype(np.uint16)) as writer:
        for length in LENGTHS:
            writer.add_document(random.integers(0, 60, length))
        writer.finish()
    return tmp_path / "corpus"


def parts(prefix: Path) -> list[Path]:
    return [Path(f"{prefix}.idx"), Path(f"{prefix}.bin"), hashes_path(prefix)]


def is_found(prefix: Path) -> bool:
    """Whether opening a pair, or reading it, refuses it; anything but a DataError is a failure."""
    try:
        dataset = IndexedDataset(prefix)
        dataset.tokens(0, dataset.num_tokens)
    except DataError:
        return True
    return False


def flips_found(prefix: Path, path: Path) -> tuple[int, int]:
    """How many of all single flipped bits of a file are found, and how many there are."""
    whole = path.read_bytes()
    found = 0
    with path.open("r+b", buffering=0) as file:
        for number, byte in enumerate(whole):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), number)
                found += is_found(prefix)
            os.pwrite(file.fileno(), bytes([byte]), number)
    assert path.read_bytes() == whole
    return found, 8 * len(whole)


@pytest.mark.goal("R30", ci=8000, nightly=8000, what="every bit of .bin, .idx and hashes flipped: found when read")
def test_every_flipped_bit_of_the_three_files_is_found(pair: Path, trials: Trials) -> None:
    assert sum(path.stat().st_size for path in parts(pair)) <= 2048
    for path in parts(pair):
        found, bits = flips_found(pair, path)
        assert found == bits, path
        assert bits == 8 * path.stat().st_size > 2000
        trials.add(bits)
    assert not is_found(pair)


@pytest.mark.goal("R30", ci=2000, nightly=2000, what="every bit of a bare .idx flipped: most found by structure alone")
def test_without_hashes_the_structure_alone_finds_most_flips_of_the_index(pair: Path, trials: Trials) -> None:
    hashes_path(pair).unlink()
    found, bits = flips_found(pair, Path(f"{pair}.idx"))
    # what is left are document bounds that stay in order
    assert found / bits > 0.95, (found, bits)
    trials.add(bits)
    trials.notes["found (%)"] = round(100 * found / bits, 1)


@pytest.mark.goal("R30", ci=1000, nightly=1000, what=".bin, .idx and hashes cut at every byte: found")
def test_every_cut_of_the_three_files_is_found(pair: Path, trials: Trials) -> None:
    for path in parts(pair):
        whole = path.read_bytes()
        for size in [*range(len(whole)), len(whole) + 1]:
            path.write_bytes((whole + b"\n")[:size])
            assert is_found(pair), (path, size)
            trials.add(1)
        path.write_bytes(whole)
    assert not is_found(pair)


def test_a_damaged_block_is_named_when_it_is_first_read_and_the_others_are_read(pair: Path) -> None:
    path = Path(f"{pair}.bin")
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    dataset = IndexedDataset(pair)
    assert dataset.tokens(0, 64).size == 64 and dataset.tokens(128, 200).size == 72
    with pytest.raises(DataError, match=r"bin: bytes 128 to 255 are damaged: .*was [0-9a-f]{32} when.*--write-hashes"):
        dataset.tokens(60, 66)
    assert IndexedDataset(pair, use_hashes=False).tokens(60, 66).size == 6


def test_each_block_is_hashed_once_also_by_threads(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = IndexedDataset(pair)
    assert dataset.checker is not None
    read, seen = dataset.checker._read, []

    def counted(size: int, start: int) -> bytes:
        seen.append(start // size)
        return read(size, start)

    monkeypatch.setattr(dataset.checker, "_read", counted)
    dataset.tokens(0, dataset.num_tokens)
    with ThreadPoolExecutor(4) as threads:
        windows = list(threads.map(lambda start: dataset.tokens(start, start + 9).tolist(), range(220)))
    assert seen == [0, 1, 2, 3]
    assert windows == [dataset.tokens(start, start + 9).tolist() for start in range(220)]


def test_the_index_is_checked_as_a_whole_however_large_it_is(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_moe.data.indexed_dataset.CHECK_ON_OPEN", 3)
    assert IndexedDataset(pair).verified and not IndexedDataset(pair, use_hashes=False).verified
    path = Path(f"{pair}.idx")
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"corpus\.idx is damaged.*xxh3-128 is [0-9a-f]{32}.*says [0-9a-f]{32}"):
        IndexedDataset(pair)


def test_merging_reads_only_what_is_right_and_writes_hashes(pair: Path, tmp_path: Path) -> None:
    merge([str(pair), str(pair)], str(tmp_path / "twice"))
    written = read_hashes(tmp_path / "twice", bin_bytes=2 * 472)
    assert written == hashes.hash_pair(tmp_path / "twice.idx", tmp_path / "twice.bin")
    path = Path(f"{pair}.bin")
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")
    with pytest.raises(DataError, match="bytes 384 to 471 are damaged"):
        merge([str(pair), str(pair)], str(tmp_path / "again"))
    assert not list(tmp_path.glob("again*"))


def test_a_pair_whose_tokenizer_nobody_told_has_the_file_that_it_had_before_they_were_told(pair: Path) -> None:
    table = json.loads(hashes_path(pair).read_bytes())
    assert set(table) == {"format", "idx_xxh3_128", "bin_bytes", "block_bytes", "blocks_xxh3_128", "xxh3_128"}
    assert IndexedDataset(pair).tokenizer_fingerprint() is None


def test_hashes_never_stand_beside_tokens_that_are_not_theirs(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_moe.data.indexed_writer.write_whole", cut_off)
    with (
        pytest.raises(KeyboardInterrupt),
        IndexedDatasetWriter(pair, dtype=np.dtype(np.uint16), overwrite=True) as writer,
    ):
        writer.add_document([1, 2, 3])
        writer.finish()
    assert not hashes_path(pair).exists()
    with pytest.raises(DataError, match="no corpus at"):
        IndexedDataset(pair)
    monkeypatch.undo()
    with IndexedDatasetWriter(pair, dtype=np.dtype(np.uint16), overwrite=True) as writer:
        writer.add_document([1, 2, 3])
        writer.finish()
    assert IndexedDataset(pair).sequence(0).tolist() == [1, 2, 3] and hashes_path(pair).exists()


HOSTILE = {
    "an empty file": b"",
    "a list": b"[]",
    "deep": b"[" * 5000,
    "not JSON": b"\xff\xfe",
    "long": b" " * 100_000,
    "another format": b'{"format": 2}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_file_of_hashes_that_is_none_is_refused(pair: Path, content: bytes) -> None:
    hashes_path(pair).write_bytes(content)
    with pytest.raises(DataError, match=r"corpus\.hashes\.json is damaged"):
        IndexedDataset(pair)


@pytest.mark.parametrize("block_bytes", [0, -1, 1 << 60, 0.5, "128", None])
def test_a_forged_file_of_hashes_is_refused(pair: Path, block_bytes: object) -> None:
    whole = read_hashes(pair, bin_bytes=472)
    assert whole is not None
    forged = json.loads(whole.to_bytes()) | {"block_bytes": block_bytes}
    forged = {name: value for name, value in forged.items() if name not in ("format", "xxh3_128")}
    hashes_path(pair).write_bytes(hashes.Hashes(**forged).to_bytes())
    with pytest.raises(DataError, match=r"corpus\.hashes\.json is damaged"):
        IndexedDataset(pair)


def test_bare_pairs_get_hashes_by_hand_and_verify_says_how_fast(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = hashes_path(pair).read_bytes()
    assert inspect_dataset.main([str(pair), "--write-hashes"]) == 2
    assert "is there already" in capsys.readouterr().err
    hashes_path(pair).unlink()
    assert inspect_dataset.main([str(pair), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hashes"].startswith("none")
    assert inspect_dataset.main([str(pair), "--write-hashes", "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hashes"] == "all right" and found["read_gb_per_s"] >= found["read_and_hashed_gb_per_s"] >= 0
    assert hashes_path(pair).read_bytes() == whole
    path = Path(f"{pair}.bin")
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x00")
    assert inspect_dataset.main([str(pair), "--verify"]) == 65
    assert "bytes 384 to 471 are damaged" in capsys.readouterr().err


CHECKED_WITHOUT_ASSERT = """
import sys
from megatron_moe.config.errors import DataError
from megatron_moe.data.indexed_dataset import IndexedDataset
try:
    dataset = IndexedDataset(sys.argv[1])
    dataset.tokens(0, dataset.num_tokens)
except DataError as error:
    sys.exit(65)
"""


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_damage_is_found_under_python_o_too(pair: Path, suffix: str) -> None:
    path = Path(f"{pair}{suffix}")
    path.write_bytes(path.read_bytes()[:-10] + b"\x07" + path.read_bytes()[-9:])
    command = [sys.executable, "-O", "-c", CHECKED_WITHOUT_ASSERT, str(pair)]
    assert subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=60).returncode == 65
