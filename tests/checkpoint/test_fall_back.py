"""The newest checkpoints are broken, for all ranks or in the view of one: all go on from the same older one."""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.load import CheckpointReader, find_checkpoint
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.checkpoint import CheckpointConfig
from megatron_moe.config.errors import CheckpointError
from megatron_moe.parallel.state import Axis
from megatron_moe.training.resume import go_on
from tests.checkpoint.samples import HastyStorage
from tests.checkpoint.test_ranks import rank_parts, save_rank, world_of

STEPS = (10, 20, 30, 40)
RANKS = 4


def save_all(rank: int, world_size: int, root: Path) -> None:
    writer = CheckpointWriter(root, world_of(world_size), None, "run", HastyStorage(), background=False)
    for step in STEPS:
        save_rank(writer, rank, world_size, step)


def invert_tensors(folder: Path, rank: int) -> None:
    """The bytes behind the headers of all tensor files: whichever of them the rank reads."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:header] + bytes(byte ^ 255 for byte in data[header:]))


def remove_own(folder: Path, rank: int) -> None:
    for path in folder.glob(f"*-r{rank:05d}.safetensors"):
        path.unlink()


def remove_files(folder: Path, rank: int) -> None:
    for path in folder.iterdir():
        path.unlink()


def nothing(folder: Path, rank: int) -> None:
    """Reading fails instead."""


DAMAGE: dict[str, Callable[[Path, int], None]] = {
    "other bytes": invert_tensors,
    "files are missing": remove_own,
    "an empty folder": remove_files,
    "reading fails": nothing,
}


@dataclass(frozen=True)
class Case:
    """Rank `viewer` reads in `view`, where the newest `broken` are damaged; all ranks do when there is no viewer."""

    damage: str
    viewer: int | None
    broken: int
    on_read: bool
    root: Path
    view: Path

    def root_of(self, rank: int) -> Path:
        return self.view if self.viewer in (None, rank) else self.root

    @property
    def bad_steps(self) -> Sequence[int]:
        return STEPS[-self.broken :]


def cases(root: Path, views: Path) -> list[Case]:
    found = []
    kinds = [("other bytes", None), *product(DAMAGE, (0, RANKS - 1))]
    for (damage, viewer), broken, on_read in product(kinds, (1, 2, 3), (False, True)):
        case = Case(damage, viewer, broken, on_read, root, views / str(len(found)))
        shutil.copytree(root, case.view, symlinks=True)
        for step in case.bad_steps:
            DAMAGE[damage](case.view / f"step_{step:08d}", viewer or 0)
        found.append(case)
    return found


@contextmanager
def reads_fail(case: Case, rank: int) -> Iterator[None]:
    """EIO for each read below the damaged folders of this rank's view."""
    preadv = os.preadv
    bad = tuple(f"{case.view}/step_{step:08d}/" for step in case.bad_steps)

    def failing(file: int, outs: Sequence[memoryview], start: int) -> int:
        if os.readlink(f"/proc/self/fd/{file}").startswith(bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, outs, start)

    if case.damage == "reading fails":
        with mock.patch("os.preadv", failing):
            yield
    else:
        yield


class Told(logging.Handler):
    """Warnings of checkpoints, while it listens."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def load(case: Case, rank: int, world: Axis, strict: bool = False) -> int:
    """The step from which this rank goes on, all its numbers being those of that step."""
    parts = rank_parts(rank, world.size, 0, fill=True)
    used: list[int] = []

    def fill(reader: CheckpointReader) -> None:
        used.append(reader.step)
        for part, blocks in parts.items():
            reader.fill_all(blocks, part)

    root = case.root_of(rank)
    if case.on_read:
        go_on(CheckpointConfig(load=str(root), strict_resume=strict), world, torch.device("cpu"), fill)
    else:
        fill(find_checkpoint(root, None, world, strict=strict))
    for part, blocks in rank_parts(rank, world.size, used[-1]).items():
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(parts[part], blocks, strict=True))
    return used[-1]


def refused(case: Case, rank: int, world: Axis) -> tuple[int, str]:
    """Exit code and message when no other than the newest may be used."""
    try:
        load(case, rank, world, strict=True)
    except CheckpointError as error:
        return error.exit_code, str(error).replace(str(case.root_of(rank)), "ROOT")
    return 0, "nobody noticed"


Outcome = tuple[int, list[str], tuple[int, str]]


def load_all(rank: int, world_size: int, wanted: Sequence[Case]) -> list[Outcome]:
    world, outcomes = world_of(world_size), []
    logger = logging.getLogger("megatron_moe")
    for case in wanted:
        told = Told()
        logger.addHandler(told)
        with reads_fail(case, rank):
            step = load(case, rank, world)
            logger.removeHandler(told)
            outcomes.append((step, told.texts, refused(case, rank, world)))
    return outcomes


@pytest.mark.goal(
    "R9", ci=54, nightly=54, what="the newest 1 to 3 broken, for all of 4 ranks or one: all agree on the same older one"
)
def test_all_ranks_agree_on_the_same_older_checkpoint(tmp_path: Path, trials: Trials) -> None:
    run_on_ranks(RANKS, save_all, tmp_path / "saved")
    (tmp_path / "views").mkdir()
    wanted = cases(tmp_path / "saved", tmp_path / "views")
    for case, outcomes in zip(wanted, zip(*run_on_ranks(RANKS, load_all, wanted), strict=True), strict=True):
        older = STEPS[-1 - case.broken]
        assert [step for step, _, _ in outcomes] == [older] * RANKS, case
        first, *others = [texts for _, texts, _ in outcomes]
        assert len(first) == 1 and others == [[]] * (RANKS - 1), (case, first, others)
        assert first[0].startswith(f"Going on from step {older} in {case.root_of(0)}; ")
        reasons = [line.partition(":")[0] for line in first[0].splitlines() if line.startswith("  step ")]
        assert reasons == [f"  step {step}" for step in reversed(case.bad_steps)]
        codes = {refusal for _, _, refusal in outcomes}
        assert len(codes) == 1, (case, codes)
        code, message = codes.pop()
        assert code == 65 and "The checkpoint of step 40 in ROOT is broken" in message
        trials.add(1)
