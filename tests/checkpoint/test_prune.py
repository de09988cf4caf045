"""Pruning keeps the last good checkpoint whatever happens; a listing tells what there is."""

import errno
import os
import time
from pathlib import Path

import pytest

from megatron_moe.checkpoint.catalogue import catalogue
from megatron_moe.checkpoint.prune import plan_pruning, prune
from megatron_moe.checkpoint.rotate import stored_steps
from megatron_moe.config.errors import NoCheckpointError, StorageError
from tests.checkpoint.samples import FailingStorage, HastyStorage, assert_holds_sample, newest, save_sample

STEPS = (10, 20, 30, 40)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in STEPS:
        save_sample(tmp_path, step)
    return tmp_path


def damage(root: Path, step: int) -> None:
    """A bit of one weight: manifest and sizes stay right."""
    path = root / f"step_{step:08d}" / "model-r00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_newest_stay_and_older_ones_go(root: Path) -> None:
    plan = plan_pruning(root, 2, None)
    assert (plan.kept, plan.removed, plan.broken) == ([40, 30], [20, 10], {})
    assert stored_steps(root) == [40, 30, 20, 10]
    prune(plan, HastyStorage())
    assert stored_steps(root) == [40, 30]
    assert plan_pruning(root, 5, None).removed == []


def test_a_damaged_one_neither_counts_nor_goes(root: Path) -> None:
    for step in (40, 30):
        damage(root, step)
    plan = plan_pruning(root, 1, None)
    assert (plan.kept, plan.removed, sorted(plan.broken)) == ([20], [10], [30, 40])
    assert "model tensor 'mask' [0:3]" in plan.broken[40]
    prune(plan, HastyStorage())
    assert_holds_sample(newest(root))
    assert newest(root).step == 20


def test_nothing_goes_when_none_is_whole(root: Path) -> None:
    for step in STEPS:
        damage(root, step)
    with pytest.raises(NoCheckpointError, match="nothing is removed"):
        plan_pruning(root, 1, 0.0)
    assert stored_steps(root) == [40, 30, 20, 10]


def test_left_overs_go_when_told_and_idle_only(root: Path) -> None:
    old, new = root / "step_00000050.tmp-run-1", root / "step_00000060.tmp-run-2"
    for folder in (old, new):
        folder.mkdir()
        (folder / "model-r00000.safetensors").write_bytes(b"x")
    hour_ago = time.time() - 3700
    for path in (old / "model-r00000.safetensors", old):
        os.utime(path, (hour_ago, hour_ago))
    assert plan_pruning(root, 4, None).stale == []
    plan = plan_pruning(root, 4, 60.0)
    assert (plan.stale, plan.in_use) == ([old], [new])
    prune(plan, HastyStorage())
    assert not old.exists() and new.exists()


def test_a_failing_disk_leaves_the_newest_and_is_told(root: Path) -> None:
    for call in range(1, 30):
        plan = plan_pruning(root, 1, None)
        if not plan.removed:
            break
        try:
            prune(plan, FailingStorage(call, 1, errno.EIO))
        except StorageError as error:
            assert "could not be removed: " in str(error) and "step_000000" in str(error)
        assert newest(root).step == 40
    assert stored_steps(root) == [40]


def test_a_listing_tells_what_is_whole_and_why_not(root: Path) -> None:
    damage(root, 40)
    (root / "step_00000030" / "state.json").unlink()
    quick = {entry.step: entry.problem for entry in catalogue(root, "sizes")}
    assert quick == {40: "", 30: "state.json is missing", 20: "", 10: ""}
    thorough = {entry.step: entry.problem for entry in catalogue(root, "xxh3")}
    assert "model tensor 'mask'" in thorough[40] and thorough[20] == ""
    entry = catalogue(root, "sizes")[2]
    size = sum(path.stat().st_size for path in (root / "step_00000020").iterdir())
    assert (entry.layout, entry.run_id, entry.num_bytes) == ("1 rank", "run", size)
    assert 0 <= entry.age_seconds < 600
    with pytest.raises(NoCheckpointError, match="is no directory"):
        catalogue(root / "absent", "sizes")
