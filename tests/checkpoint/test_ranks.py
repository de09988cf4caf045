"""Several ranks: they save together, agree on what went wrong, and load on other numbers of ranks."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.checkpoint.rewrite import reshard
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.checkpoint.storage import Storage
from megatron_moe.config.errors import CheckpointError, ReplicaError, StorageError
from megatron_moe.parallel.blocks import Block, flat_range_blocks
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import LogicalPiece
from megatron_moe.parallel.state import Axis, ParallelState
from tests.checkpoint.samples import ALONE, FailingStorage, HastyStorage, newest, numbered

SHAPE = (8, 6)
PIECE = LogicalPiece("w", SHAPE, (0, 0), SHAPE, None)


def world_of(world_size: int) -> Axis:
    return ParallelState.distributed(Grid(world_size)).world


def rank_parts(rank: int, world_size: int, step: int, fill: bool = False) -> dict[str, list[Block]]:
    """w split by rows, norm the same everywhere, exp_avg in flat ranges; for filling: zeros instead."""
    weight, norm, flat = numbered(SHAPE) + step, torch.full((5,), float(step)), numbered(SHAPE).view(-1) * step
    if fill:
        weight, norm, flat = torch.zeros_like(weight), torch.zeros_like(norm), torch.zeros_like(flat)
    rows, lengths = SHAPE[0] // world_size, flat.tensor_split(world_size)
    start = sum(part.numel() for part in lengths[:rank])
    return {
        "model": [
            Block("w", SHAPE, (rank * rows, 0), weight[rank * rows : (rank + 1) * rows], True),
            Block("norm", (5,), (0,), norm, rank == 0),
        ],
        "optim": flat_range_blocks(PIECE, "exp_avg.", lengths[rank], start, True),
    }


def save_rank(writer: CheckpointWriter, rank: int, world_size: int, step: int) -> None:
    writer.save(step, rank_parts(rank, world_size, step), {"samples": step}, "{}", {})


def check_load(rank: int, world_size: int, root: Path) -> int:
    reader = find_checkpoint(root, None, world_of(world_size))
    parts = rank_parts(rank, world_size, reader.step, fill=True)
    expected = rank_parts(rank, world_size, reader.step)
    for part, blocks in parts.items():
        reader.fill(blocks, part)
        for found, block in zip(blocks, expected[part], strict=True):
            assert torch.equal(found.tensor, block.tensor), (rank, block.name)
    return reader.step


def check_save(rank: int, world_size: int, root: Path, background: bool) -> int | None:
    writer = CheckpointWriter(root, world_of(world_size), 2, "run", HastyStorage(), background)
    for step in (10, 20, 30):
        save_rank(writer, rank, world_size, step)
        while background and writer.commit_if_ready() is None:
            time.sleep(0.001)
    writer.finish()
    return writer.last_step


@pytest.mark.parametrize("background", [True, False])
def test_four_ranks_save_and_any_number_loads(tmp_path: Path, background: bool) -> None:
    assert run_on_ranks(4, check_save, tmp_path, background) == [30] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000020", "step_00000030"]
    assert run_on_ranks(4, check_load, tmp_path) == [30] * 4
    assert run_on_ranks(2, check_load, tmp_path) == [30] * 2
    reader = newest(tmp_path)
    assert torch.equal(reader.logical("w"), numbered(SHAPE) + 30)
    assert torch.equal(reader.logical("exp_avg.w", "optim"), numbered(SHAPE) * 30)
    assert sum(name.startswith("model-") for name in reader.manifest.files) == 4


def check_drift(rank: int, world_size: int, root: Path) -> str:
    writer = CheckpointWriter(root, world_of(world_size), None, "run")
    parts = rank_parts(rank, world_size, 7)
    if rank == 2:
        parts["model"][1].tensor[3] += 1e-6
    writer.save(7, parts, {}, "{}", {})
    try:
        writer.finish()
    except ReplicaError as error:
        save_rank(writer, rank, world_size, 8)
        writer.finish()
        return str(error)
    return "nobody noticed"


def test_replicas_that_drifted_apart_are_named_on_all_ranks_and_not_committed(tmp_path: Path) -> None:
    told = run_on_ranks(4, check_drift, tmp_path)
    assert len(set(told)) == 1
    assert "model tensor 'norm' [0:5]" in told[0] and "ranks [2] differ from ranks [0, 1, 3]" in told[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000008"]


def check_one_bad_disk(
    rank: int, world_size: int, root: Path, bad_rank: int, first: int
) -> tuple[bool, str, int | None]:
    save_rank(CheckpointWriter(root, world_of(world_size), None, "run", background=False), rank, world_size, 1)
    storage = FailingStorage(first, 1, errno.EDQUOT) if rank == bad_rank else Storage()
    writer = CheckpointWriter(root, world_of(world_size), None, "run", storage=storage)
    save_rank(writer, rank, world_size, 2)
    writer.finish()
    failed = isinstance(writer.last_error, StorageError)
    told = str(writer.last_error)
    save_rank(writer, rank, world_size, 3)
    writer.finish()
    return failed, told, writer.last_step


@pytest.mark.parametrize(("bad_rank", "first"), [(1, 1), (1, 2), (1, 4), (0, 1), (0, 3), (0, 14), (0, 18)])
def test_one_full_disk_fails_the_save_on_all_ranks_alike_and_training_goes_on(
    tmp_path: Path, bad_rank: int, first: int
) -> None:
    outcomes = run_on_ranks(2, check_one_bad_disk, tmp_path, bad_rank, first)
    assert outcomes[0] == outcomes[1]
    failed, told, last = outcomes[0]
    assert failed and "step 2 was not saved" in told and "quota" in told.lower() and last == 3
    assert "step_00000002" not in os.listdir(tmp_path) or first == 18
    assert run_on_ranks(2, check_load, tmp_path) == [3, 3]


def test_all_ranks_fall_back_to_the_same_older_checkpoint(tmp_path: Path) -> None:
    run_on_ranks(2, check_save, tmp_path, False)
    # a bit in a file that only the last rank of four verifies
    path = tmp_path / "step_00000030" / "optim-r00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run_on_ranks(4, check_load, tmp_path) == [20] * 4


def check_misfit(rank: int, world_size: int, root: Path) -> tuple[str, str, list[str]]:
    reader = find_checkpoint(root, None, world_of(world_size))
    wanted = rank_parts(rank, world_size, 0, fill=True)["model"]
    if rank == 1:
        wanted[0] = Block("v", SHAPE, wanted[0].offset, wanted[0].tensor, True)
    told = ["", ""]
    try:
        reader.fill(wanted)
    except CheckpointError as error:
        told[0] = str(error)
    if rank == 1:
        (root / "step_00000030" / "model-r00000.safetensors").unlink()
    reader.unused([])  # all ranks pass here after the file is gone
    try:
        reader.fill(rank_parts(rank, world_size, 0, fill=True)["model"])
    except CheckpointError as error:
        told[1] = str(error)
    return told[0], told[1], reader.unused(["w"] if rank == 0 else [])


def test_what_does_not_fit_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    run_on_ranks(2, check_save, tmp_path, False)
    one, two = run_on_ranks(2, check_misfit, tmp_path)
    assert one == two
    assert "1 not in the checkpoint: v" in one[0] and "only" not in one[0]
    assert "model-r00000.safetensors is missing" in one[1]
    assert one[2] == ["norm"]


def check_holes(rank: int, world_size: int, root: Path) -> str:
    writer = CheckpointWriter(root, world_of(world_size), None, "run")
    rows = {0: (0, 3), 1: (2, 6), 2: (6, 7)}[rank]
    tensor = numbered(SHAPE)[rows[0] : rows[1]]
    hole = numbered((4,))[: 1 + rank] if rank < 2 else numbered((4,))[3:]
    offset = {0: 0, 1: 0, 2: 3}[rank]
    blocks = [Block("w", SHAPE, (rows[0], 0), tensor, True), Block("b", (4,), (offset,), hole, rank != 0)]
    writer.save(1, {"model": blocks}, {}, "{}", {})
    try:
        writer.finish()
    except CheckpointError as error:
        return str(error)
    return "nobody noticed"


def test_holes_and_overlaps_between_ranks_are_named(tmp_path: Path) -> None:
    told = run_on_ranks(3, check_holes, tmp_path)
    assert len(set(told)) == 1
    assert "model tensor 'b' of shape [4]: no rank writes [2:3]" in told[0]
    assert "model tensor 'w': [0:3, 0:6] of rank 0 and [2:6, 0:6] of rank 1 would both be written" in told[0]
    assert list(tmp_path.iterdir()) == []


def check_resave(rank: int, world_size: int, root: Path) -> list[Any]:
    writer = CheckpointWriter(root, world_of(world_size), None, "again", background=False)
    save_rank(writer, rank, world_size, 30)
    return [writer.last_step, find_checkpoint(root, 30, world_of(world_size)).run_id]


def test_all_ranks_leave_a_valid_step_and_replace_a_broken_one(tmp_path: Path) -> None:
    run_on_ranks(2, check_save, tmp_path, False)
    assert run_on_ranks(2, check_resave, tmp_path) == [[None, "run"]] * 2
    (tmp_path / "step_00000030" / "model-r00001.safetensors").unlink()
    assert run_on_ranks(2, check_resave, tmp_path) == [[30, "again"]] * 2
    assert newest(tmp_path, ALONE).step == 30


def check_account(rank: int, world_size: int, root: Path, same_half: bool) -> str:
    reader = find_checkpoint(root, None, world_of(world_size))
    wanted = rank_parts(0 if same_half else rank, world_size, 0, fill=True)
    try:
        for part in ("model", "optim"):
            reader.fill_all(wanted[part], part)
    except CheckpointError as error:
        return str(error)
    expected = rank_parts(rank, world_size, 30)
    pairs = [pair for part in expected for pair in zip(wanted[part], expected[part], strict=True)]
    return "filled" if all(torch.equal(found.tensor, block.tensor) for found, block in pairs) else "other numbers"


def test_ranks_that_fill_the_same_half_twice_are_refused_together(tmp_path: Path) -> None:
    run_on_ranks(2, check_save, tmp_path / "saved", False)
    for ranks in (1, 3):
        reshard(newest(tmp_path / "saved"), tmp_path / f"{ranks}", ranks)
        assert run_on_ranks(2, check_account, tmp_path / f"{ranks}", False) == ["filled"] * 2
    one, two = run_on_ranks(2, check_account, tmp_path / "saved", True)
    assert one == two
    # each rank is the first holder of what it asks for: rows 0 to 4, twice
    assert "not filled exactly once: " in one and "w ([0:4, 0:6] and [0:4, 0:6] overlap)" in one
