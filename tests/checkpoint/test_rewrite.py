"""Another number of ranks, the same tensors bit for bit; and how two checkpoints differ."""

import errno
import hashlib
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint import rewrite
from megatron_moe.checkpoint.catalogue import open_place
from megatron_moe.checkpoint.compare import compare_values, differences
from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.checkpoint.rewrite import reshard
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.errors import CheckpointError, ConfigError, StorageError
from megatron_moe.parallel.blocks import Block
from tests.checkpoint.moe_samples import moe_blocks, save_moe
from tests.checkpoint.samples import (
    ALONE,
    FailingStorage,
    HastyStorage,
    assert_holds_sample,
    save_step,
    whole_block,
)
from tests.checkpoint.tilings import random_shape, random_tiling

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("sha256", [True, False])
def test_every_number_of_ranks_gives_the_same_tensors_and_state(tmp_path: Path, sha256: bool) -> None:
    save_step(CheckpointWriter(tmp_path / "from", ALONE, None, "run", background=False, sha256=sha256), 7)
    before = open_place(tmp_path / "from")
    for ranks in (1, 2, 3, 8):
        root = tmp_path / str(ranks)
        assert reshard(before, root, ranks, HastyStorage()).layout == {"world_size": ranks}
        after = find_checkpoint(root, None, ALONE, strict=True, check="sha256")
        assert_holds_sample(after)
        for name, file in after.manifest.files.items():
            known = sha256 or name.endswith(".json")
            assert file.sha256 == (hashlib.sha256((after.folder / name).read_bytes()).hexdigest() if known else "")
        assert after.texts == before.texts and after.run_id == before.run_id
        assert list(differences(before, after)) == []
        assert sorted(os.listdir(root)) == ["latest", "step_00000007"]


def test_one_rank_makes_one_file_for_each_part_and_two_share_the_experts(tmp_path: Path) -> None:
    save_moe(tmp_path / "from", moe_blocks())
    reader = open_place(tmp_path / "from")
    assert sum(name.endswith("safetensors") for name in reshard(reader, tmp_path / "one", 1).files) == 2
    files = reshard(reader, tmp_path / "two", 2).files
    sizes = [files[f"optim-r{rank:05d}.safetensors"].size for rank in (0, 1)]
    assert max(sizes) < 1.1 * min(sizes)
    # no dimension has eight parts: whole tensors go round
    assert sum(name.startswith("optim") for name in reshard(reader, tmp_path / "eight", 8).files) == 8


def test_random_tensors_in_random_cuts_survive_a_chain_of_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "_SCRATCH_BYTES", 64)
    for seed in range(12):
        rng = random.Random(seed)
        blocks, expected = [], {}
        for number in range(6):
            shape, dtype = random_shape(rng), rng.choice(DTYPES)
            whole = torch.randint(0, 2, (*shape, 8), dtype=torch.uint8).sum(-1).to(dtype)
            expected[f"t{number}"] = whole
            for tile in random_tiling(rng, shape):
                blocks.append(Block(f"t{number}", shape, tile.offset, whole[_index(tile.offset, tile.shape)], True))
        save_moe(tmp_path / f"{seed}-0", blocks)
        for link in (1, 2, 3):
            source = open_place(tmp_path / f"{seed}-{link - 1}")
            reshard(source, tmp_path / f"{seed}-{link}", rng.randint(1, 7), HastyStorage())
        last = open_place(tmp_path / f"{seed}-3")
        assert list(differences(open_place(tmp_path / f"{seed}-0"), last)) == []
        for name, whole in expected.items():
            assert torch.equal(last.logical(name), whole)


def _index(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))


def test_what_is_there_is_not_overwritten_and_a_damaged_source_not_copied(tmp_path: Path) -> None:
    folder = save_moe(tmp_path / "from", moe_blocks())
    reader = open_place(folder)
    with pytest.raises(ConfigError, match="has step_00000001 already, which is not overwritten"):
        reshard(reader, tmp_path / "from", 2)
    with pytest.raises(ConfigError, match="--ranks 0 must be 1 to 99,999"):
        reshard(reader, tmp_path / "to", 0)
    path = folder / "optim-r00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="optim tensor"):
        open_place(folder)
    assert not (tmp_path / "to").exists()


def test_a_failure_at_any_call_leaves_nothing_or_all(tmp_path: Path) -> None:
    save_moe(tmp_path / "from", moe_blocks())
    reader = open_place(tmp_path / "from")
    call, finished = 0, False
    while not finished:
        call += 1
        root = tmp_path / f"{call}"
        try:
            reshard(reader, root, 2, FailingStorage(call, 1, errno.ENOSPC))
            finished = True
        except StorageError as error:
            assert "this save needs" in str(error)
        if (root / "step_00000001").exists():
            assert list(differences(reader, open_place(root))) == []
        elif root.exists():
            assert os.listdir(root) == []
    assert call > 20


def test_differences_name_presence_shape_type_and_values(tmp_path: Path) -> None:
    blocks = moe_blocks()
    save_moe(tmp_path / "a", [*blocks, whole_block("x", torch.zeros(2)), whole_block("y", torch.zeros(2))])
    nudged = blocks[0].tensor.clone()
    nudged[0, 0] += 0.5
    nudged[1, 1] = float("nan")
    other = [replace(blocks[0], tensor=nudged), *blocks[1:]]
    tensors = {"x": torch.zeros(2, 1), "y": torch.zeros(2).half(), "z": torch.ones(1)}
    extra = [whole_block(name, tensor) for name, tensor in tensors.items()]
    save_moe(tmp_path / "b", [*other, *extra])
    one, two = open_place(tmp_path / "a"), open_place(tmp_path / "b")
    found = [line for line in differences(one, two) if line.startswith("model")]
    assert found[0].startswith("model tensor 'embedding.weight': 2 of 18 elements differ, 1 of them not finite; ")
    assert found[1:] == [
        "model tensor 'x': shape [2] / [2, 1]",
        "model tensor 'y': dtype F32 / F16",
        "model tensor 'z': only in the second",
    ]
    values = compare_values(one, two, "embedding.weight")
    assert values.max_abs == pytest.approx(0.5, rel=1e-6)
    before, after = float(blocks[0].tensor[0, 0]), float(nudged[0, 0])
    assert values.max_rel == pytest.approx(abs(after - before) / max(abs(after), abs(before)))


def test_differences_name_every_option_and_every_state(tmp_path: Path) -> None:
    blocks = moe_blocks()
    save_moe(tmp_path / "a", blocks, step=1)
    save_moe(tmp_path / "b", blocks, step=2)
    config = {"moe": {"num_experts": 4}, "model": {"num_layers": 2}}
    one, two = open_place(tmp_path / "a"), open_place(tmp_path / "b")
    one.texts["config.json"] = json.dumps(config)
    two.texts["config.json"] = json.dumps({"moe": {"num_experts": 8, "router_topk": 2}})
    assert list(differences(one, two)) == [
        "config.json moe.num_experts: 4 / 8",
        "config.json moe.router_topk: absent / 2",
        'config.json model: {"num_layers": 2} / absent',
        "state.json samples: 8 / 16",
    ]
