"""Saving on one rank: background and foreground, saving again, rotation, leftovers, what is refused."""

import logging
import threading
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint.rotate import stored_steps
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.checkpoint.storage import Storage
from megatron_moe.config.errors import CheckpointError, ConfigError
from megatron_moe.parallel.blocks import Block
from tests.checkpoint.samples import (
    ALONE,
    CONFIG,
    assert_holds_sample,
    files_of,
    newest,
    sample_parts,
    save_sample,
    save_step,
    whole_block,
)


class WaitingStorage(Storage):
    """Makes no file until it may."""

    def __init__(self) -> None:
        self.may = threading.Event()

    def create(self, path: Path) -> int:
        assert self.may.wait(30)
        return super().create(path)


def damage(root: Path, step: int) -> None:
    """A bit of one weight: manifest and sizes stay right."""
    path = root / f"step_{step:08d}" / "model-r00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove_manifest(root: Path, step: int) -> None:
    (root / f"step_{step:08d}" / "MANIFEST.json").unlink()


def test_background_and_foreground_write_the_same_bytes(tmp_path: Path) -> None:
    save_sample(tmp_path / "foreground", 4)
    writer = CheckpointWriter(tmp_path / "background", ALONE, None, "run")
    save_step(writer, 4)
    writer.finish()
    foreground = files_of(tmp_path / "foreground" / "step_00000004")
    assert len(foreground) == 6
    assert files_of(tmp_path / "background" / "step_00000004") == foreground


def test_what_changes_after_save_is_not_saved(tmp_path: Path) -> None:
    storage = WaitingStorage()
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", storage=storage)
    parts = sample_parts(4)
    writer.save(4, parts, {"samples": 32}, CONFIG, {"corpus": "abc"})
    for block in parts["model"]:
        block.tensor.zero_()
    assert writer.commit_if_ready() is None
    assert stored_steps(tmp_path) == []
    storage.may.set()
    assert writer.commit_if_ready(block=True) == 4
    writer.finish()
    assert_holds_sample(newest(tmp_path))


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, ALONE, None, "run")
    for step in (1, 2, 3):
        save_step(writer, step)
        assert stored_steps(tmp_path) == list(range(step - 1, 0, -1))
    writer.finish()
    assert stored_steps(tmp_path) == [3, 2, 1] and writer.last_step == 3


def test_a_valid_step_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_sample(tmp_path, 1)
    before = files_of(tmp_path / "step_00000001")
    writer = CheckpointWriter(tmp_path, ALONE, None, "other", background=False)
    with caplog.at_level(logging.WARNING):
        writer.save(1, {"model": [whole_block("else", torch.ones(3))]}, {}, "{}", {})
    assert "step 1" in caplog.text and "by run run, is valid already" in caplog.text
    assert files_of(tmp_path / "step_00000001") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


@pytest.mark.parametrize("break_it", [damage, remove_manifest])
def test_a_broken_step_is_replaced(tmp_path: Path, break_it: object) -> None:
    save_sample(tmp_path, 1)
    assert callable(break_it)
    break_it(tmp_path, 1)
    save_sample(tmp_path, 1, run_id="again")
    assert newest(tmp_path).run_id == "again"
    assert_holds_sample(newest(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, ALONE, 2, "run", background=False)
    for step in (10, 20, 30, 40):
        save_step(writer, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000030", "step_00000040"]
    assert (tmp_path / "latest").readlink() == Path("step_00000040")


def test_rotation_neither_counts_nor_removes_broken_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_sample(tmp_path, step)
    remove_manifest(tmp_path, 20)
    save_sample(tmp_path, 40, keep=2)
    assert stored_steps(tmp_path) == [40, 30, 20]
    remove_manifest(tmp_path, 30)
    remove_manifest(tmp_path, 40)
    save_sample(tmp_path, 50, keep=1)
    assert stored_steps(tmp_path) == [50, 40, 30, 20]


def test_rotation_never_removes_what_was_just_saved(tmp_path: Path) -> None:
    for step in (100, 200):
        save_sample(tmp_path, step)
    save_sample(tmp_path, 50, keep=1)  # a run that went back
    assert stored_steps(tmp_path) == [200, 50]


def test_leftovers_go_at_the_next_start_and_nothing_else(tmp_path: Path) -> None:
    save_sample(tmp_path, 1)
    for name in ("step_00000002.tmp-run-1", "step_00000001.tmp-removed"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_text("x")
    (tmp_path / "step_00000003.tmp-run-2").symlink_to(tmp_path / "step_00000001")
    (tmp_path / "latest.tmp-run").symlink_to("nowhere")
    (tmp_path / "notes.tmp-mine").write_text("mine")
    CheckpointWriter(tmp_path, ALONE, None, "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "notes.tmp-mine", "step_00000001"]
    assert_holds_sample(newest(tmp_path))


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ([Block("w", (4,), (0,), torch.ones(3), True)], "model tensor 'w' of shape [4]: no rank writes [3:4]"),
        (
            [Block("w", (4,), (0,), torch.ones(3), True), Block("w", (4,), (2,), torch.ones(2), True)],
            "[0:3] of rank 0 and [2:4] of rank 0 would both be written",
        ),
        ([whole_block("w", torch.ones(3)), whole_block("w", torch.ones(3))], "model tensor 'w' twice"),
        ([Block("w", (4,), (3,), torch.ones(3), True)], "block [3:6] lies outside tensor 'w' of shape [4]"),
        ([whole_block("w", torch.ones(3, dtype=torch.complex64))], "torch.complex64 cannot be stored"),
        ([Block("w", (3,), (0,), torch.ones(3), False)], "no rank writes [0:3]"),
        (
            [Block("w", (2,), (0,), torch.ones(1), True), Block("w", (3,), (1,), torch.ones(1), True)],
            "is F32 [2] on rank 0, but F32 [3] on rank 0",
        ),
    ],
)
def test_tensors_that_do_not_add_up_are_refused_by_name(tmp_path: Path, blocks: list[Block], told: str) -> None:
    save_sample(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, ALONE, None, "run", background=False)
    with pytest.raises(CheckpointError) as caught:
        writer.save(2, {"model": blocks}, {}, "{}", {})
    assert told in str(caught.value)
    assert writer.last_error is caught.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    save_step(writer, 3)
    assert newest(tmp_path).step == 3


def test_experts_with_the_same_numbers_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def name(expert: int) -> str:
        return f"layers.3.mlp.experts.{expert}.w1"

    writer = CheckpointWriter(tmp_path, ALONE, None, "run", background=False)
    experts = [whole_block(name(e), torch.full((2, 2), float(e % 32))) for e in range(33)]
    with caplog.at_level(logging.WARNING):
        writer.save(1, {"model": experts}, {}, "{}", {})
    assert caplog.messages == [f"step 1: experts {name(0)} and {name(32)} hold the same numbers"]


@pytest.mark.parametrize("run_id", ["", "a/b", "..", "a b", "x" * 65])
def test_a_run_id_that_is_no_name_is_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ConfigError, match="run id"):
        CheckpointWriter(tmp_path, ALONE, None, run_id)


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep=0"):
        CheckpointWriter(tmp_path, ALONE, 0, "run")
