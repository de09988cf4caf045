"""Streaming into the project's own checkpoint: whole and verifiable at the end, nothing of it before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.errors import StorageError
from megatron_moe.convert.checkpoint_files import CheckpointSource, new_checkpoint
from megatron_moe.parallel.blocks import Block
from megatron_moe.parallel.state import ParallelState

WORLD = ParallelState.alone().world
TENSORS = {
    "wide": torch.arange(6.0).view(2, 3),
    "narrow": torch.tensor([1.0, 2.0, 3.0]).bfloat16(),
}
ANNOUNCED = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_what_was_streamed_passes_every_check_and_reads_back(tmp_path: Path) -> None:
    with new_checkpoint(tmp_path, ANNOUNCED) as sink:
        for name, tensor in TENSORS.items():
            sink.write(name, tensor)
        sink.finish("{}", {"step": 0}, {"tokenizer": "x"})
    reader = find_checkpoint(tmp_path, None, WORLD, strict=True, check="xxh3")
    assert (reader.step, reader.state, reader.data, reader.config_json) == (0, {"step": 0}, {"tokenizer": "x"}, "{}")
    source = CheckpointSource(reader)
    assert list(source.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert (source.shape(name), source.dtype(name)) == ANNOUNCED[name]
        assert torch.equal(source.read(name), tensor)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000000"]


def test_it_is_what_the_training_loop_would_have_written(tmp_path: Path) -> None:
    with new_checkpoint(tmp_path / "streamed", ANNOUNCED) as sink:
        for name, tensor in TENSORS.items():
            sink.write(name, tensor)
        sink.finish("{}", {}, {})
    writer = CheckpointWriter(tmp_path / "saved", WORLD, keep=None, run_id="run", background=False)
    blocks = [Block(name, tuple(t.shape), (0,) * t.dim(), t, True) for name, t in TENSORS.items()]
    writer.save(0, {"model": blocks}, {}, "{}", {})
    writer.finish()
    streamed, saved = (find_checkpoint(tmp_path / name, 0, WORLD).manifest for name in ("streamed", "saved"))
    for name in TENSORS:
        ours, theirs = streamed.parts["model"][name], saved.parts["model"][name]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert [part.xxh3 for part in ours.slices] == [part.xxh3 for part in theirs.slices]
    assert streamed.totals == saved.totals
    assert streamed.files.keys() == saved.files.keys()


def test_tensors_out_of_order_or_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not what was announced"), new_checkpoint(tmp_path, ANNOUNCED) as sink:
        sink.write("narrow", TENSORS["narrow"])
    with (
        pytest.raises(ValueError, match="narrow was announced and never came"),
        new_checkpoint(tmp_path, ANNOUNCED) as sink,
    ):
        sink.write("wide", TENSORS["wide"])
        sink.finish("{}", {}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="this save needs 30 bytes"), new_checkpoint(tmp_path, ANNOUNCED) as sink:
        sink.write("wide", TENSORS["wide"])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []
