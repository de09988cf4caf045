"""Power lost, or the process killed, at any moment of a save: every order of unsynced writes leaves a whole checkpoint.

What stands on the disk is worked out from the recorded calls (disk_model.py). Of each moment all legal states are
listed; those that look the same to the reader are opened once.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.checkpoint.manifest import MANIFEST
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.errors import NoCheckpointError
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from tests.checkpoint.disk_model import (
    Folder,
    count_survivors,
    is_looked_at,
    play,
    put_on_disk,
    read_disk,
    survivors,
)
from tests.checkpoint.samples import Operation, RecordingStorage, assert_holds_sample, newest, numbered, save_sample

Opened = Callable[[Path], int]  # the step that loading finds there; raises where its numbers are not those saved


def open_sample(root: Path) -> int:
    reader = newest(root)
    assert_holds_sample(reader)
    return reader.step


@dataclass
class Outcomes:
    """Each state is opened once: the step that was found, None if there was none or it held other numbers."""

    where: Path
    opened: Opened = open_sample
    known: dict[str, int | None] = field(default_factory=dict)

    def step_of(self, state: Folder) -> int | None:
        key = repr(state)
        if key not in self.known:
            put_on_disk(state, self.where)
            try:
                self.known[key] = self.opened(self.where)
            except (NoCheckpointError, AssertionError):
                self.known[key] = None
            shutil.rmtree(self.where)
        return self.known[key]


def check_every_moment(model: Folder, operations: Sequence[Operation], outcomes: Outcomes) -> int:
    """Step 1 is saved; from then on the last one reported, or the next, is found. Returns the number of states."""
    reported, states = 1, 0
    for count in range(len(operations) + 1):
        states += count_survivors(model)
        found = {outcomes.step_of(state) for state in survivors(model)}
        assert found <= {reported, reported + 1}, (count, operations[count - 1], found)
        if count < len(operations):
            play(model, operations[count])
            reported = max(reported, step_reported(operations[count]))
    assert found == {reported}
    return states


def step_reported(operation: Operation) -> int:
    """The link is made only after the commit was reported to the ranks: from then on its step must survive."""
    return int(operation.other.removeprefix("step_")) if operation.kind == "symlink" else 0


def broken_newer(root: Path) -> None:
    """Step 2 is there, but damaged: saving it again replaces it."""
    save_sample(root, 2)
    (root / "step_00000002" / "state.json").write_text("{}")


def leftovers(root: Path) -> None:
    """An interrupted run left its folders."""
    shutil.copytree(root / "step_00000001", root / "step_00000002.tmp-run-1")
    shutil.copytree(root / "step_00000001", root / "step_00000001.tmp-removed")


def nothing_else(root: Path) -> None:
    pass


def record(root: Path, before: Callable[[Path], None], keep: int | None, last: int) -> tuple[Folder, list[Operation]]:
    """The disk with step 1, and what saving the steps from 2 to `last` then does to it."""
    save_sample(root, 1)
    before(root)
    model = read_disk(root)
    storage = RecordingStorage(root)
    for step in range(2, last + 1):
        save_sample(root, step, keep=keep, storage=storage)
    assert newest(root).step == last
    return model, storage.operations


@pytest.mark.goal(
    "R4", ci=16, nightly=16, what="power cut at any call of a save: every state of the disk, as the reader sees it"
)
def test_every_order_of_unsynced_writes_leaves_a_whole_checkpoint(tmp_path: Path, trials: Trials) -> None:
    outcomes, states = Outcomes(tmp_path / "after"), 0
    for number, before in enumerate((nothing_else, broken_newer, leftovers)):
        for keep in (None, 1):
            model, operations = record(tmp_path / f"{number}-{keep}", before, keep, last=2 if number else 4)
            states += check_every_moment(model, operations, outcomes)
    trials.add(len(outcomes.known))
    trials.notes["states of the disk, with what the reader ignores"] = states
    assert states > 1000


WEIGHT = (4, 6)


def save_half(rank: int, world_size: int, root: Path) -> list[Operation]:
    """Steps 1 and 2 of a tensor in two halves; what rank `rank` does to the disk for step 2."""
    world = ParallelState.distributed(Grid(world_size)).world
    storage = RecordingStorage(root)
    writer = CheckpointWriter(root, world, 1, "run", storage)
    for step in (1, 2):
        storage.operations.clear()
        half = (numbered(WEIGHT) + step)[rank * 2 : rank * 2 + 2]
        writer.save(step, {"model": [Block("w", WEIGHT, (rank * 2, 0), half, True)]}, {"step": step}, "{}", {})
        writer.finish()
        if step == 1 and rank == 0:
            shutil.copytree(root, root.with_name("before"), symlinks=True)
    return storage.operations


def open_halves(root: Path) -> int:
    reader = newest(root)
    assert torch.equal(reader.logical("w"), numbered(WEIGHT) + reader.step)
    assert reader.state == {"step": reader.step}
    return reader.step


@pytest.mark.goal("R4", ci=4, nightly=4, what="power cut at any call of a save of two ranks, in the order of time")
def test_every_order_of_the_writes_of_two_ranks_leaves_a_whole_checkpoint(tmp_path: Path, trials: Trials) -> None:
    one, two = run_on_ranks(2, save_half, tmp_path / "real")
    assert len(one) > 20 and len(two) > 3
    outcomes = Outcomes(tmp_path / "after", open_halves)
    operations = sorted([*one, *two], key=lambda operation: operation.done_ns)
    states = check_every_moment(read_disk(tmp_path / "before"), operations, outcomes)
    trials.notes["states of the disk of two ranks, with what the reader ignores"] = states
    trials.add(len(outcomes.known))


def without_fsync(operations: list[Operation]) -> list[Operation]:
    return [operation for operation in operations if operation.kind != "fsync"]


def without_sync_of(name: str) -> Callable[[list[Operation]], list[Operation]]:
    def dropped(operations: list[Operation]) -> list[Operation]:
        return [operation for operation in operations if (operation.kind, operation.path) != ("sync_dir", name)]

    return dropped


NEW = "step_00000002.tmp-run-1"


def manifest_after_rename(operations: list[Operation]) -> list[Operation]:
    early = [operation for operation in operations if operation.path == f"{NEW}/{MANIFEST}"]
    others = [operation for operation in operations if operation not in early]
    place = next(number for number, operation in enumerate(others) if operation.path == NEW and operation.other)
    late = [replace(operation, path=f"step_00000002/{MANIFEST}") for operation in early]
    return others[: place + 1] + late + others[place + 1 :]


@pytest.mark.parametrize(
    ("broken", "bites"),
    [
        (list, False),
        (without_fsync, True),
        (without_sync_of("."), True),
        (without_sync_of(NEW), True),
        (manifest_after_rename, True),
    ],
)
def test_a_save_that_syncs_too_little_is_found_out(
    tmp_path: Path, broken: Callable[[list[Operation]], list[Operation]], bites: bool
) -> None:
    model, operations = record(tmp_path / "real", nothing_else, None, last=2)
    for operation in broken(operations):
        play(model, operation)
    outcomes = Outcomes(tmp_path / "after")
    lost = any(outcomes.step_of(state) != 2 for state in survivors(model))
    assert lost == bites


def test_zeros_in_place_of_unsynced_numbers_are_not_taken_for_them(tmp_path: Path) -> None:
    """All names are there and all sizes right: only hashes tell."""
    model, operations = record(tmp_path / "real", nothing_else, None, last=2)
    tensors = f"{NEW}/model-r00000.safetensors"
    for operation in operations:
        if (operation.kind, operation.path) != ("fsync", tensors):
            play(model, operation)
    outcomes = Outcomes(tmp_path / "after")
    found = [outcomes.step_of(state) for state in survivors(model)]
    # three writes: none, one, two or all of them, three of these with zeros behind; only the whole file is step 2
    assert sorted(found) == [1] * 6 + [2]


def test_the_reader_ignores_what_the_model_leaves_out(tmp_path: Path) -> None:
    root = tmp_path / "real"
    save_sample(root, 1)
    save_sample(tmp_path / "other", 2)
    whole = tmp_path / "other" / "step_00000002"
    for name in (NEW, "step_00000002.tmp-run-1-replaced", "step_00000002.tmp-removed", "latest.tmp-run"):
        assert not is_looked_at(name)
        for place in (whole, whole / MANIFEST):
            (shutil.copytree if place.is_dir() else shutil.copy)(place, root / name)
            assert open_sample(root) == 1
            (shutil.rmtree if place.is_dir() else Path.unlink)(root / name)
    assert is_looked_at(whole.name)
    shutil.copytree(whole, root / whole.name)
    assert open_sample(root) == 2
