"""What was saved comes back, in any cut, type and place; and nothing else does."""

import json
import pickle
import random
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe.checkpoint import fill as fill_module
from megatron_moe.checkpoint.reshard import Rectangle
from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.errors import CheckpointError
from megatron_moe.parallel.blocks import Block, flat_range_blocks
from megatron_moe.parallel.layout import LogicalPiece
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
from tests.checkpoint.tilings import random_shape, random_tiling

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def save(root: Path, blocks: list[Block], step: int = 1) -> None:
    writer = CheckpointWriter(root, ALONE, None, "run", storage=HastyStorage(), background=False)
    writer.save(step, {"model": blocks}, {}, "{}", {})
    assert writer.last_error is None and writer.last_step == step


def test_everything_comes_back(tmp_path: Path) -> None:
    save_sample(tmp_path, 12)
    reader = newest(tmp_path)
    assert reader.step == 12
    assert reader.names("model") == ["mask", "norm", "nothing", "w"]
    assert reader.names("optim") == ["exp_avg.w", "step"]
    assert reader.names("else") == []
    assert reader.tensors["model"]["w"].shape == (4, 6)
    assert reader.tensors["model"]["norm"].dtype == "BF16"
    assert_holds_sample(reader)


def test_the_folder_holds_what_the_contract_says(tmp_path: Path) -> None:
    save_sample(tmp_path, 12)
    folder = tmp_path / "step_00000012"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000012"]
    assert (tmp_path / "latest").readlink() == Path("step_00000012")
    assert sorted(path.name for path in folder.iterdir()) == [
        "MANIFEST.json",
        "config.json",
        "data.json",
        "model-r00000.safetensors",
        "optim-r00000.safetensors",
        "state.json",
    ]
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["run_id"] == "run" and manifest["step"] == 12 and manifest["schema"] == 1
    assert manifest["totals"]["tensors"] == 6
    assert manifest["totals"]["elements"] == 5 + 24 + 3 + 0 + 1 + 24
    assert manifest["totals"]["bytes"] == 10 + 96 + 3 + 0 + 8 + 192


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    save_sample(tmp_path, 12)
    expected = sample_parts(12)
    found = load_file(tmp_path / "step_00000012" / "model-r00000.safetensors")
    assert sorted(found) == ["mask", "norm", "w[0:4, 0:3]", "w[0:4, 3:6]"]
    assert torch.equal(found["norm"], expected["model"][0].tensor)
    assert torch.equal(found["w[0:4, 3:6]"], expected["model"][2].tensor)
    found = load_file(tmp_path / "step_00000012" / "optim-r00000.safetensors")
    assert found["step"].shape == () and found["step"].item() == 12


@pytest.mark.parametrize("scratch", [64, 32 << 20])
def test_any_tiling_loads_into_any_other(tmp_path: Path, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_module, "_SCRATCH_BYTES", scratch)
    for seed in range(scratch, scratch + 100):
        check_resharding(tmp_path / str(seed), seed)


def check_resharding(root: Path, seed: int) -> None:
    rng = random.Random(seed)
    shape, dtype = random_shape(rng), rng.choice(DTYPES)
    whole = numbered(shape).to(dtype)
    save(root, [Block("w", shape, t.offset, cut(whole, t), True) for t in random_tiling(rng, shape)])
    # a strided target: every second element along a last dimension of its own
    target = torch.zeros((*shape, 2), dtype=dtype)[..., 0] if seed % 3 == 0 else torch.zeros(shape, dtype=dtype)
    reader = newest(root)
    reader.fill([Block("w", shape, t.offset, cut(target, t), True) for t in random_tiling(rng, shape)])
    assert torch.equal(target, whole)
    assert torch.equal(reader.logical("w"), whole)


def cut(tensor: torch.Tensor, tile: Rectangle) -> torch.Tensor:
    return tensor[tile.slices_in(Rectangle.whole(tuple(tensor.shape)))]


@pytest.mark.parametrize(("before", "after"), [(1, 4), (3, 5), (7, 2)])
def test_flat_ranges_of_an_optimizer_load_on_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    shape = (5, 4, 3)
    piece = LogicalPiece("w", shape, (0, 0, 0), shape, None)

    def ranges(flat: torch.Tensor, count: int) -> list[Block]:
        found, start = [], 0
        for part in flat.tensor_split(count):
            found += flat_range_blocks(piece, "exp_avg.", part, start, True)
            start += part.numel()
        return found

    whole = numbered(shape)
    save(tmp_path, ranges(whole.view(-1), before))
    target = torch.zeros(60)
    newest(tmp_path).fill(ranges(target, after))
    assert torch.equal(target, whole.view(-1))


def test_large_gaps_are_skipped_and_large_tensors_pass_in_parts(tmp_path: Path) -> None:
    wide = numbered((3, 9000), torch.int64)  # rows of 72 kB: runs are read one by one
    save(tmp_path, [whole_block("w", wide)])
    target = torch.zeros(3, 100, dtype=torch.int64)
    newest(tmp_path).fill([Block("w", (3, 9000), (0, 8900), target, True)])
    assert torch.equal(target, wide[:, 8900:])


def test_the_caller_says_when_to_convert(tmp_path: Path) -> None:
    save(tmp_path, [whole_block("w", torch.tensor([1.5, 2.5])), whole_block("n", torch.tensor([1, 2]))])
    reader = newest(tmp_path)
    target = torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"w \(stored F32, needed torch.bfloat16; pass cast=True"):
        reader.fill([whole_block("w", target)])
    reader.fill([whole_block("w", target)], cast=True)
    assert target.tolist() == [1.5, 2.5]
    with pytest.raises(CheckpointError, match=r"n \(stored I64, needed torch.float32\)"):
        reader.fill([whole_block("n", torch.zeros(2))], cast=True)


def test_another_model_is_told_apart_by_name(tmp_path: Path) -> None:
    stored = [whole_block(f"a{index:02d}", torch.zeros(2)) for index in range(14)]
    save(tmp_path, [*stored, whole_block("w", torch.zeros(2, 3))])
    wanted = [whole_block(f"b{index:02d}", torch.ones(2)) for index in range(12)]
    target = torch.ones(3, 2)
    with pytest.raises(CheckpointError) as caught:
        newest(tmp_path).fill([*wanted, whole_block("w", target)])
    told = str(caught.value)
    assert "12 not in the checkpoint: b00, b01" in told and "b10, b11\n" in told
    assert "14 in the checkpoint only: a00, a01" in told and "a12, a13\n" in told
    assert "1 of another shape: w (stored [2, 3], needed [3, 2])" in told
    assert "config.json" in told
    assert torch.equal(target, torch.ones(3, 2))


def test_unused_names_what_was_not_asked_for(tmp_path: Path) -> None:
    save_sample(tmp_path, 1)
    assert newest(tmp_path).unused(["w", "norm", "unknown"]) == ["mask", "nothing"]
    with pytest.raises(CheckpointError, match="no model tensor 'unknown'"):
        newest(tmp_path).logical("unknown")


def test_no_pickle_is_opened_or_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trap(*arguments: Any, **options: Any) -> NoReturn:
        raise AssertionError("pickle")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, trap)
    monkeypatch.setattr(torch, "load", trap)
    monkeypatch.setattr(torch, "save", trap)
    save_sample(tmp_path, 3)
    assert_holds_sample(newest(tmp_path))


def test_filling_changes_only_the_blocks(tmp_path: Path) -> None:
    save(tmp_path, [whole_block("w", numbered((4, 4)))])
    around = torch.full((6, 6), -1.0)
    newest(tmp_path).fill([Block("w", (4, 4), (1, 0), around[2:4, 1:5], True)])
    expected = torch.full((6, 6), -1.0)
    expected[2:4, 1:5] = numbered((4, 4))[1:3]
    assert torch.equal(around, expected)


def test_parameters_that_need_gradients_are_saved_and_filled(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    save(tmp_path, [whole_block("w", parameter)])
    target = torch.nn.Parameter(torch.zeros(2))
    newest(tmp_path).fill([whole_block("w", target)])
    assert target.tolist() == [1.0, 2.0] and target.requires_grad


def test_emptied_blocks_are_really_empty() -> None:
    parts = sample_parts(1)
    assert not torch.equal(emptied(parts)["model"][1].tensor, parts["model"][1].tensor)
