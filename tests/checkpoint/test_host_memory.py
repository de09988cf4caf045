"""Snapshots use the same memory again, and large writes pass the page cache without changing a byte."""

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.checkpoint.host_memory import HostMemory
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.checkpoint.snapshot import take_snapshot
from megatron_moe.checkpoint.storage import DIRECT_BYTES, PAGE_BYTES, Storage, append
from megatron_moe.checkpoint.tensor_file import bytes_of, header_bytes
from megatron_moe.parallel.blocks import Block
from tests.checkpoint.samples import ALONE, HastyStorage, newest, whole_block


def test_memory_grows_is_used_again_and_begins_at_a_page() -> None:
    memory = HostMemory()
    first = memory.room(10_000, pinned=False)
    smaller = memory.room(5_000, pinned=False)
    assert (len(first), len(smaller)) == (10_000, 5_000) and first.data_ptr() == smaller.data_ptr()
    larger = memory.room(20_000, pinned=False)
    assert len(larger) == 20_000 and larger.data_ptr() % PAGE_BYTES == first.data_ptr() % PAGE_BYTES == 0
    memory.release()
    assert len(memory._held) == 0


def test_a_snapshot_holds_every_kind_of_tensor_and_none_of_its_later_changes() -> None:
    kinds = [
        torch.randn(3, 5),
        torch.randn(5, 3).t(),
        torch.randn(4, 8)[:, 2:5],
        torch.tensor(2.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.randn(7).to(torch.bfloat16),
        torch.randn(6).to(torch.float8_e4m3fn),
        torch.tensor([True, False]),
        torch._neg_view(torch.randn(4)),
    ]
    blocks = [Block(f"w{at}", tuple(kind.shape), (0,) * kind.dim(), kind, at % 3 > 0) for at, kind in enumerate(kinds)]
    copies = [kind.contiguous().clone().view(-1) for kind in kinds]
    expected = {f"w{at}": copy.view(torch.uint8).tolist() for at, copy in enumerate(copies)}
    memory = HostMemory()
    take_snapshot({"model": [whole_block("old", torch.full((100,), 7.0))]}, memory)
    found = take_snapshot({"model": blocks}, memory)["model"]
    for kind in kinds:
        kind.zero_()
    seen = {}
    for group in (found.written, found.compared):
        for block in group.described():
            seen[block.name] = group.data[block.start : block.start + block.length].tolist()
    assert seen == expected


def test_one_save_after_another_uses_the_same_memory_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[int] = []
    room = HostMemory.room

    def watched(memory: HostMemory, num_bytes: int, pinned: bool) -> torch.Tensor:
        found = room(memory, num_bytes, pinned)
        places.append(found.data_ptr())
        return found

    monkeypatch.setattr(HostMemory, "room", watched)
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", HastyStorage())
    weight = torch.zeros(1000)
    for step in range(1, 4):
        writer.save(step, {"model": [whole_block("w", weight.fill_(step))]}, {}, "{}", {})
        weight.fill_(-1)
    writer.finish()
    assert len(set(places)) == 1 and len(writer._memory._held) == 0
    for step in range(1, 4):
        path = tmp_path / f"step_{step:08d}" / "model-r00000.safetensors"
        assert np.frombuffer(path.read_bytes()[-4000:], dtype=np.float32).tolist() == [step] * 1000




def test_a_writer_prepares_memory_that_the_first_save_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = np.empty

    def counted(size: int, dtype: type) -> object:
        made.append(size)
        return empty(size, dtype)

    monkeypatch.setattr("megatron_moe.checkpoint.host_memory.np.empty", counted)
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", HastyStorage())
    parts = {"model": [whole_block("w", torch.full((5000,), 3.0))]}
    writer.prepare(parts)
    writer.save(1, parts, {}, "{}", {})
    assert made == [5 * PAGE_BYTES + PAGE_BYTES]
    writer.finish()
    assert torch.equal(newest(tmp_path).logical("w"), parts["model"][0].tensor)
    writer.prepare(parts)
    writer.finish()
    assert len(writer._memory._held) == 0


def test_memory_that_cannot_be_had_is_told_by_the_save_not_by_the_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(memory: HostMemory, num_bytes: int, pinned: bool) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(HostMemory, "room", none)
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", HastyStorage())
    parts = {"model": [whole_block("w", torch.ones(10))]}
    writer.prepare(parts)
    writer.save(1, parts, {}, "{}", {})
    assert writer.commit_if_ready(block=True) is None
    assert "no copy in host memory: out of memory" in str(writer.last_error)


@pytest.mark.parametrize("direct", [True, False])
def test_large_writes_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    write, refused = os.write, []

    def without_direct(file: int, data: memoryview) -> int:
        if fcntl_flags(file) & os.O_DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(file, data)

    if not direct:
        monkeypatch.setattr(os, "write", without_direct)
    rng = random.Random(5)
    memory = HostMemory().room(5 * DIRECT_BYTES, pinned=False)
    memory.copy_(torch.randint(0, 256, (5 * DIRECT_BYTES,), dtype=torch.uint8))
    data = bytes_of(memory)
    # (where in memory, how many bytes): pages, odd places, odd lengths, one after the other in one file
    pieces = [(0, DIRECT_BYTES), (PAGE_BYTES, 2 * DIRECT_BYTES + 5), (0, DIRECT_BYTES), (3, DIRECT_BYTES + 1), (0, 10)]
    pieces += [(rng.randrange(PAGE_BYTES), rng.randrange(3 * DIRECT_BYTES)) for _ in range(4)]
    storage = Storage()
    file = storage.create(tmp_path / "file")
    for start, length in pieces:
        append(storage, file, data.data[start : start + length])
        assert not fcntl_flags(file) & os.O_DIRECT
    storage.fsync(file)
    storage.close(file)
    expected = b"".join(data[start : start + length].tobytes() for start, length in pieces)
    assert (tmp_path / "file").read_bytes() == expected
    assert direct or refused


def fcntl_flags(file: int) -> int:
    with open(f"/proc/self/fdinfo/{file}", encoding="ascii") as info:
        return next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))


def test_a_full_disk_is_told_by_a_direct_write_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage = Storage()
    file = storage.create(tmp_path / "file")
    data = bytes_of(HostMemory().room(DIRECT_BYTES, pinned=False))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        append(storage, file, data.data)
    assert not fcntl_flags(file) & os.O_DIRECT
    storage.close(file)


def test_a_large_file_begins_its_bytes_at_a_page_and_reads_as_before(tmp_path: Path) -> None:
    weight = torch.randn(DIRECT_BYTES // 4 + 3)
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", background=False)
    writer.save(1, {"model": [whole_block("w", weight)], "optim": [whole_block("m", weight[:2])]}, {}, "{}", {})
    reader = newest(tmp_path)
    assert reader.manifest.files["model-r00000.safetensors"].header == PAGE_BYTES
    assert reader.manifest.files["optim-r00000.safetensors"].header < PAGE_BYTES
    assert torch.equal(reader.logical("w"), weight)


@pytest.mark.parametrize("multiple", [8, PAGE_BYTES])
def test_a_header_is_padded(multiple: int) -> None:
    for length in range(1, 20):
        assert len(header_bytes([("w" * length, "F32", (2,))], {}, multiple)) % multiple == 0
