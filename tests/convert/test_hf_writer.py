"""Sizes, shard plans and the failures of a disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from megatron_moe.config.errors import ConfigError, StorageError
from megatron_moe.convert.hf_writer import FolderWriter, new_folder, parse_size, plan_shards


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2 * 2**30), ("1.5 KB", 1500), ("4096", 4096)],
)
def test_sizes_are_read_in_the_usual_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 parsecs", "0GB", "5GBs", "0.0001KB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text)


def test_shards_are_filled_in_order_and_tensors_lie_by_name() -> None:
    shapes = {"c": (2,), "a": (1, 3), "b": (9,), "d": (1,)}
    shards = plan_shards(shapes, torch.bfloat16, 10)
    assert [shard.file for shard in shards] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [list(shard.places) for shard in shards] == [["a", "c"], ["b"], ["d"]]
    assert [shard.size for shard in shards] == [10, 18, 2]
    length = int.from_bytes(shards[0].header[:8], "little")
    assert len(shards[0].header) == 8 + length
    assert len(shards[0].header) % 8 == 0
    assert json.loads(shards[0].header[8:]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [1, 3], "data_offsets": [0, 6]},
        "c": {"dtype": "BF16", "shape": [2], "data_offsets": [6, 10]},
    }
    assert shards[0].places["c"] == ((2,), len(shards[0].header) + 6)


def test_a_tensor_that_was_not_planned_so_is_refused(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path, {"a": (2,), "b": (2,)}, dtype=torch.float32, max_shard_bytes=100)
    with pytest.raises(ValueError, match="a: planned"):
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="a: planned"):
        writer.write("a", torch.zeros(2, dtype=torch.float64))
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="never written, first b"):
        writer.close()
    writer.abandon()


def test_views_and_strides_are_written_in_order(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path, {"a": (3, 2)}, dtype=torch.float32, max_shard_bytes=100)
    tensor = torch.arange(6.0).view(2, 3).t()
    writer.write("a", tensor)
    writer.close()
    data = (tmp_path / "model.safetensors").read_bytes()
    assert data[-24:] == tensor.contiguous().numpy().tobytes()


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left"), new_folder(tmp_path / "hf") as folder:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to"), new_folder(tmp_path / "file" / "hf"):
        pass


def test_the_folder_appears_only_at_the_end_with_usual_rights(tmp_path: Path) -> None:
    target = tmp_path / "new" / "hf"
    with new_folder(target) as folder:
        assert not target.exists()
        (folder / "a").write_text("x")
    assert (target / "a").read_text() == "x"
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode
    assert os.listdir(target.parent) == ["hf"]


def test_even_a_broken_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "hf").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"), new_folder(tmp_path / "hf"):
        pass


def test_what_a_killed_writer_left_goes_and_what_another_fills_stays(tmp_path: Path) -> None:
    left, others = tmp_path / ".hf.tmp-left", tmp_path / ".hf2.tmp-left"
    for folder in (left, others):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    with new_folder(tmp_path / "hf") as first:
        assert not left.exists()
        with new_folder(tmp_path / "hf") as second:
            assert first.is_dir() and second != first
    assert (tmp_path / "hf").is_dir() and others.is_dir()
