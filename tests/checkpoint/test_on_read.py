"""A checkpoint that is verified as it is read: every bit counts, whoever asks for it and in whatever pieces."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.checkpoint import fill
from megatron_moe.checkpoint.load import DamagedError, find_checkpoint
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.checkpoint.tensor_file import Bytes, read_scattered
from megatron_moe.config.checkpoint import CheckpointConfig
from megatron_moe.config.errors import CheckpointError, NoCheckpointError
from megatron_moe.parallel.blocks import Block
from megatron_moe.training.resume import go_on
from tests.checkpoint.samples import (
    ALONE,
    HastyStorage,
    assert_holds_sample,
    emptied,
    newest,
    numbered,
    sample_parts,
    save_sample,
    whole_block,
)
from tests.checkpoint.test_ranks import rank_parts, save_rank, world_of

CPU = torch.device("cpu")


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        value = os.pread(file.fileno(), 1, bit // 8)[0]
        os.pwrite(file.fileno(), bytes([value ^ (1 << bit % 8)]), bit // 8)


def read_all(root: Path) -> None:
    reader = newest(root, check="on_read")
    for part, blocks in emptied(sample_parts(reader.step)).items():
        reader.fill_all(blocks, part)


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    save_sample(tmp_path, 3)
    assert_holds_sample(newest(tmp_path, check="on_read"))


def test_every_flipped_bit_is_found_before_the_end_of_the_load(tmp_path: Path) -> None:
    save_sample(tmp_path, 1)
    for path in sorted((tmp_path / "step_00000001").iterdir()):
        # of JSON and headers a bit of each byte: all of them are tried in test_damage.py, with the same code
        for bit in range(0, 8 * path.stat().st_size, 9):
            flip(path, bit)
            with pytest.raises((DamagedError, NoCheckpointError), match=path.name):
                read_all(tmp_path)
            flip(path, bit)
    read_all(tmp_path)


def saved(tmp_path: Path, tensor: torch.Tensor) -> Path:
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", HastyStorage(), background=False)
    writer.save(1, {"model": [whole_block("w", tensor)]}, {}, "{}", {})
    return tmp_path / "step_00000001" / "model-r00000.safetensors"


def halves() -> list[Block]:
    return [Block("w", (8, 6), (0, start), torch.zeros(8, 3), True) for start in (0, 3)]


WAYS: dict[str, Callable[[], list[Block]]] = {
    "whole": lambda: [whole_block("w", torch.zeros(8, 6))],
    "strided": lambda: [whole_block("w", torch.zeros(6, 8).t())],
    "another type": lambda: [whole_block("w", torch.zeros(8, 6, dtype=torch.float64))],
    "in pieces": halves,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call_bytes", [1 << 20, 16])
@pytest.mark.parametrize("scratch_bytes", [1 << 20, 16])
def test_damage_is_found_however_a_tensor_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, call_bytes: int, scratch_bytes: int
) -> None:
    monkeypatch.setattr(fill, "_CALL_BYTES", call_bytes)
    monkeypatch.setattr(fill, "_SCRATCH_BYTES", scratch_bytes)
    path = saved(tmp_path, numbered((8, 6)))
    blocks = WAYS[way]()
    newest(tmp_path, check="on_read").fill_all(blocks, cast=True)
    for block in blocks:
        start, stop = block.offset[1], block.offset[1] + block.shape[1]
        assert torch.equal(block.tensor.to(torch.float32), numbered((8, 6))[:, start:stop])
    flip(path, 8 * path.stat().st_size - 1)
    with pytest.raises(DamagedError, match=r"model-r00000.safetensors .* tensor 'w' \[0:8, 0:6\] has another hash"):
        newest(tmp_path, check="on_read").fill_all(WAYS[way](), cast=True)


def test_a_tensor_that_nobody_asks_for_is_verified_too(tmp_path: Path) -> None:
    save_sample(tmp_path, 1)
    path = tmp_path / "step_00000001" / "optim-r00000.safetensors"
    flip(path, 8 * path.stat().st_size - 1)
    reader = newest(tmp_path, check="on_read")
    with pytest.raises(DamagedError, match="tensor 'exp_avg.w'"):
        reader.fill([block for block in emptied(sample_parts(1))["optim"] if block.name == "step"], "optim")


def test_many_small_slices_are_read_by_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"w.{number:03}" for number in range(100)]
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", HastyStorage(), background=False)
    writer.save(1, {"model": [whole_block(name, torch.tensor([float(name[2:])])) for name in names]}, {}, "{}", {})
    calls: list[int] = []

    def counted(file: int, outs: list[Bytes], start: int) -> None:
        calls.append(len(outs))
        read_scattered(file, outs, start)

    monkeypatch.setattr(fill, "read_scattered", counted)
    monkeypatch.setattr(fill, "_CALL_SLICES", 64)
    blocks = [whole_block(name, torch.zeros(1)) for name in names]
    newest(tmp_path, check="on_read").fill_all(blocks)
    assert calls == [64, 36]
    assert [block.tensor.item() for block in blocks] == [float(number) for number in range(100)]


def test_a_read_that_stops_early_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(range(60)))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, outs, start: preadv(file, [outs[0][:7]], start))
    outs = [np.zeros(size, dtype=np.uint8) for size in (5, 0, 20, 11)]
    with (tmp_path / "file").open("rb") as file:
        read_scattered(file.fileno(), outs, 10)
        assert np.concatenate(outs).tolist() == list(range(10, 46))
        with pytest.raises(EOFError, match="ends at byte 60, 4 bytes too early"):
            read_scattered(file.fileno(), [np.zeros(14, dtype=np.uint8)], 50)


@pytest.mark.parametrize("broken", [1, 2])
def test_a_run_goes_on_from_the_newest_that_proves_whole(tmp_path: Path, broken: int) -> None:
    for step in (10, 20, 30):
        save_sample(tmp_path, step)
    for step in (30, 20)[:broken]:
        path = tmp_path / f"step_{step:08d}" / "optim-r00000.safetensors"
        flip(path, 8 * path.stat().st_size - 1)
    tried: list[int] = []
    target = emptied(sample_parts(0))

    def load(reader: object) -> None:
        tried.append(reader.step)  # type: ignore[attr-defined]
        for part, blocks in target.items():
            reader.fill_all(blocks, part)  # type: ignore[attr-defined]

    go_on(CheckpointConfig(load=str(tmp_path)), ALONE, CPU, load)
    assert tried == [30, 20, 10][: broken + 1]
    for part, blocks in sample_parts(tried[-1]).items():
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(target[part], blocks, strict=True))


def test_a_step_that_was_asked_for_is_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    for step in (10, 20):
        save_sample(tmp_path, step)
    path = tmp_path / "step_00000020" / "model-r00000.safetensors"
    flip(path, 8 * path.stat().st_size - 1)
    config = CheckpointConfig(load=str(tmp_path), ckpt_step=20)
    with pytest.raises(CheckpointError, match="(?s)no other may be used.*has another hash"):
        go_on(config, ALONE, CPU, lambda reader: reader.fill_all(emptied(sample_parts(20))["model"]))


def check_rank(rank: int, world_size: int, root: Path) -> list[str]:
    """Of step 2, only bytes that the last rank reads are wrong: all ranks hear of it, and go on together from 1."""
    world = world_of(world_size)
    writer = CheckpointWriter(root, world, None, "run", HastyStorage(), background=False)
    for step in (1, 2):
        save_rank(writer, rank, world_size, step)
    if rank == 0:
        path = root / "step_00000002" / f"model-r{world_size - 1:05d}.safetensors"
        flip(path, 8 * path.stat().st_size - 1)
    said: list[str] = []
    damaged: dict[int, str] = {}
    while True:
        reader = find_checkpoint(root, None, world, check="on_read", damaged=damaged)
        try:
            parts = rank_parts(rank, world_size, 0, fill=True)
            for part, blocks in parts.items():
                reader.fill_all(blocks, part)
        except CheckpointError as error:
            damaged[reader.step] = str(error)
            said.append(str(error))
            continue
        expected = rank_parts(rank, world_size, reader.step)
        for part, blocks in parts.items():
            assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(blocks, expected[part], strict=True))
        return [*said, str(reader.step)]


def test_all_ranks_fall_back_together(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, check_rank, tmp_path)
    assert first == second and first[-1] == "1" and len(first) == 2
    assert "rank 1: model-r00001.safetensors is damaged" in first[0]
