"""Any one bit of a checkpoint of four ranks flips: they find it together, when it is examined and when it is read."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.load import Examined, examine, find_checkpoint
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.errors import CheckpointError
from megatron_moe.parallel.blocks import Block, flat_range_blocks
from megatron_moe.parallel.layout import LogicalPiece
from megatron_moe.parallel.state import Axis
from tests.checkpoint.samples import ALONE, HastyStorage
from tests.checkpoint.test_ranks import world_of

pytestmark = pytest.mark.timeout(7200)

CPU = torch.device("cpu")
RANKS, STEP, ROWS = 4, 1, 128
FOLDER = f"step_{STEP:08d}"
Flip = tuple[str, int]  # name of a file, and a bit of it


def parts(rank: int, fill: bool = False) -> dict[str, list[Block]]:
    """Two weights split by rows, one norm held by all, and a moment of each weight in flat ranges: about 300 kB."""
    draws = torch.Generator().manual_seed(rank)
    found: dict[str, list[Block]] = {"model": [], "optim": []}
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float32)):
        shape, own = (ROWS, 120), ROWS // RANKS
        weight = torch.zeros(own, 120) if fill else torch.randn(own, 120, generator=draws)
        found["model"].append(Block(name, shape, (rank * own, 0), weight.to(dtype), True))
        piece = LogicalPiece(name, shape, (0, 0), shape, None)
        moment = torch.zeros(own * 120) if fill else torch.randn(own * 120, generator=draws)
        found["optim"] += flat_range_blocks(piece, "exp_avg.", moment, rank * own * 120, True)
    found["model"].append(Block("norm", (50,), (0,), torch.full((50,), 0.0 if fill else 3.0), rank == 0))
    return found


def flip(folder: Path, where: Flip) -> None:
    name, bit = where
    with (folder / name).open("r+b") as file:
        value = os.pread(file.fileno(), 1, bit // 8)[0]
        os.pwrite(file.fileno(), bytes([value ^ (1 << bit % 8)]), bit // 8)


def read(root: Path, world: Axis) -> str:
    """Load with hashes checked on the way; what is said against it, if anything."""
    try:
        reader = find_checkpoint(root, STEP, world, check="on_read")
        for part, blocks in parts(world.rank, fill=True).items():
            reader.fill_all(blocks, part)
    except CheckpointError as error:
        return str(error)
    return ""


def large() -> dict[str, list[Block]]:
    """Of one rank: 6 MB in a hundred tensors."""
    draws = torch.Generator().manual_seed(0)
    blocks = [Block(f"w{at}", (120, 125), (0, 0), torch.randn(120, 125, generator=draws), True) for at in range(100)]
    return {"model": blocks[:50], "optim": blocks[50:]}


def write(rank: int, world_size: int, root: Path) -> None:
    writer = CheckpointWriter(root, world_of(world_size), None, "run", HastyStorage(), background=False)
    writer.save(STEP, parts(rank), {"samples": 7}, "{}", {"corpus": "abc"})
    assert writer.last_error is None


def look(rank: int, world_size: int, root: Path, flips: Sequence[Flip]) -> list[tuple[str, str]]:
    """For each flip what this rank hears, when the checkpoint is examined and when it is read; undamaged at the end."""
    world, folder = world_of(world_size), root / FOLDER
    heard = []
    for where in [*flips, None]:
        if rank == 0 and where is not None:
            flip(folder, where)
        world.comm.barrier()
        found = examine(folder, STEP, world, CPU, "xxh3")
        heard.append((found if isinstance(found, str) else "", read(root, world)))
        world.comm.barrier()
        if rank == 0 and where is not None:
            flip(folder, where)
    return heard


def draw(rng: random.Random, sizes: dict[str, int]) -> Flip:
    """Half of them anywhere, as disks do it; half in a file drawn first, so that the small ones have their share."""
    if rng.random() < 0.5:
        name = rng.choice(list(sizes))
    else:
        (name,) = rng.choices(list(sizes), weights=list(sizes.values()))
    return name, rng.randrange(8 * sizes[name])


@pytest.mark.goal("R8", ci=100, nightly=4000, what="a random bit of a checkpoint of 4 ranks flipped: all ranks told")
def test_any_flipped_bit_is_told_on_all_ranks(tmp_path: Path, trials: Trials) -> None:
    run_on_ranks(RANKS, write, tmp_path)
    sizes = {path.name: path.stat().st_size for path in sorted((tmp_path / FOLDER).iterdir())}
    assert sum(sizes.values()) > 200_000 and len(sizes) >= 2 * RANKS
    rng = random.Random(trials.seed)
    flips = [draw(rng, sizes) for _ in range(trials.first + trials.wanted)][trials.first :]
    heard = run_on_ranks(RANKS, look, tmp_path, flips)
    assert all(rank == heard[0] for rank in heard)
    assert heard[0][-1] == ("", "")
    for number, _ in trials:
        name, bit = flips[number - trials.first]
        examined, on_read = heard[0][number - trials.first]
        assert name in examined and name in on_read, (name, bit, examined, on_read)


@pytest.mark.goal("R8", ci=1000, nightly=100_000, what="a random bit of a checkpoint of 6 MB flipped: found, named")
def test_any_flipped_bit_of_a_larger_one_is_found(tmp_path: Path, trials: Trials) -> None:
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", HastyStorage(), background=False)
    writer.save(STEP, large(), {"samples": 7}, "{}", {"corpus": "abc"})
    folder = tmp_path / FOLDER
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    assert sum(sizes.values()) > 6_000_000
    for number, rng in trials:
        where = draw(rng, sizes)
        flip(folder, where)
        found = examine(folder, STEP, ALONE, CPU, "xxh3")
        flip(folder, where)
        assert isinstance(found, str) and where[0] in found, (number, where, found)
    assert isinstance(examine(folder, STEP, ALONE, CPU, "xxh3"), Examined)
