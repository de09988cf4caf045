"""Nothing is lost in silence: each way to break a converter or a checkpoint is noticed, by name."""

import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from goals import Trials

from megatron_moe.checkpoint.inspection import inspect_checkpoint
from megatron_moe.checkpoint.names import absent_experts, folded
from megatron_moe.config.errors import CheckpointError, MegatronMoEError
from megatron_moe.parallel.blocks import Block
from tests.checkpoint.moe_samples import EXPERTS, expert, moe_blocks, save_moe
from tests.checkpoint.samples import emptied, newest, whole_block

Blocks = list[Block]
Converter = Callable[[Blocks, random.Random], Blocks]


def pick(blocks: Blocks, rng: random.Random, word: str = "experts") -> int:
    return rng.choice([index for index, block in enumerate(blocks) if word in block.name])


def changed(blocks: Blocks, index: int, **values: object) -> Blocks:
    return [*blocks[:index], replace(blocks[index], **values), *blocks[index + 1 :]]  # type: ignore[arg-type]


def without(blocks: Blocks, names: set[str]) -> Blocks:
    return [block for block in blocks if block.name not in names]


def drop_a_weight_of_an_expert(blocks: Blocks, rng: random.Random) -> Blocks:
    return without(blocks, {blocks[pick(blocks, rng)].name})


def drop_an_expert(blocks: Blocks, rng: random.Random) -> Blocks:
    layer, number = rng.randrange(2), rng.randrange(EXPERTS)
    return without(blocks, {expert(layer, number, weight) for weight in ("w1", "w2")})


def drop_the_last_expert_everywhere(blocks: Blocks, rng: random.Random) -> Blocks:
    return without(blocks, {expert(la, EXPERTS - 1, weight) for la in (0, 1) for weight in ("w1", "w2")})


def drop_all_experts(blocks: Blocks, rng: random.Random) -> Blocks:
    return [block for block in blocks if "experts" not in block.name]


def keep_one_ranks_experts(blocks: Blocks, rng: random.Random) -> Blocks:
    """What is left when only the first of two expert-parallel ranks writes."""
    lost = {expert(la, e, weight) for la in (0, 1) for e in range(EXPERTS // 2, EXPERTS) for weight in ("w1", "w2")}
    return without(blocks, lost)


def repeat_the_first_ranks_experts(blocks: Blocks, rng: random.Random) -> Blocks:
    """A gather that takes the first rank's part twice: expert 2 is expert 0."""
    by_name = {block.name: block.tensor for block in blocks}
    for block in blocks:
        for number in range(EXPERTS // 2, EXPERTS):
            if f"experts.{number}." in block.name:
                by_name[block.name] = by_name[block.name.replace(f".{number}.w", f".{number - EXPERTS // 2}.w")]
    return [block if "experts" not in block.name else replace(block, tensor=by_name[block.name]) for block in blocks]


def duplicate_an_expert(blocks: Blocks, rng: random.Random) -> Blocks:
    layer, (one, two) = rng.randrange(2), rng.sample(range(EXPERTS), 2)
    source = next(block.tensor for block in blocks if block.name == expert(layer, one, "w1"))
    index = next(index for index, block in enumerate(blocks) if block.name == expert(layer, two, "w1"))
    return changed(blocks, index, tensor=source)


def rename_a_tensor(blocks: Blocks, rng: random.Random) -> Blocks:
    index = pick(blocks, rng, "")
    return changed(blocks, index, name=blocks[index].name + "_")


def rename_a_layer(blocks: Blocks, rng: random.Random) -> Blocks:
    return [replace(block, name=block.name.replace("layers.1.", "layers.2.")) for block in blocks]


def count_experts_from_one(blocks: Blocks, rng: random.Random) -> Blocks:
    numbers = range(EXPERTS)
    return [
        next((replace(b, name=b.name.replace(f".{e}.w", f".{e + 1}.w")) for e in numbers if f".{e}.w" in b.name), b)
        for b in blocks
    ]


def add_an_expert(blocks: Blocks, rng: random.Random) -> Blocks:
    return [*blocks, *(whole_block(expert(0, EXPERTS, w), torch.randn(2, 2)) for w in ("w1", "w2"))]


def add_a_tensor(blocks: Blocks, rng: random.Random) -> Blocks:
    return [*blocks, whole_block("layers.0.lora.weight", torch.randn(2))]


def transpose(blocks: Blocks, rng: random.Random) -> Blocks:
    tensor = blocks[index := pick(blocks, rng, "w2")].tensor.T.contiguous()
    return changed(blocks, index, tensor=tensor, global_shape=tuple(tensor.shape))


def cut_a_tensor_short(blocks: Blocks, rng: random.Random) -> Blocks:
    tensor = blocks[index := pick(blocks, rng)].tensor[:-1]
    return changed(blocks, index, tensor=tensor, global_shape=tuple(tensor.shape))


def change_the_type(blocks: Blocks, rng: random.Random) -> Blocks:
    return changed(blocks, index := pick(blocks, rng), tensor=blocks[index].tensor.half())


def lose_half_of_a_tensor(blocks: Blocks, rng: random.Random) -> Blocks:
    index = pick(blocks, rng, "embedding")
    return blocks[:index] + blocks[index + 1 :]


def write_one_half_twice(blocks: Blocks, rng: random.Random) -> Blocks:
    return [replace(block, offset=(0, 0)) if block.name == "embedding.weight" else block for block in blocks]


def write_a_tensor_twice(blocks: Blocks, rng: random.Random) -> Blocks:
    return [*blocks, blocks[pick(blocks, rng)]]


def shift_a_half(blocks: Blocks, rng: random.Random) -> Blocks:
    return changed(blocks, 1, offset=(2, 0))


def forget_that_it_is_the_first_holder(blocks: Blocks, rng: random.Random) -> Blocks:
    return changed(blocks, pick(blocks, rng, ""), primary=False)


CONVERTERS: list[Converter] = [
    drop_a_weight_of_an_expert,
    drop_an_expert,
    drop_the_last_expert_everywhere,
    drop_all_experts,
    keep_one_ranks_experts,
    repeat_the_first_ranks_experts,
    duplicate_an_expert,
    rename_a_tensor,
    rename_a_layer,
    count_experts_from_one,
    add_an_expert,
    add_a_tensor,
    transpose,
    cut_a_tensor_short,
    change_the_type,
    lose_half_of_a_tensor,
    write_one_half_twice,
    write_a_tensor_twice,
    shift_a_half,
    forget_that_it_is_the_first_holder,
]
SEEDS = range(5)


def told_by_a_load(root: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The error, or what was warned of; "" for a load in silence."""
    target = emptied({"model": moe_blocks()})["model"]
    with caplog.at_level(logging.WARNING):
        try:
            newest(root).fill_all(target)
        except MegatronMoEError as error:
            return str(error)
    return "\n".join(caplog.messages)


@pytest.mark.goal("R15", ci=1, nightly=1, what="a converter with a bug: what is lost, doubled or strange is named")
@pytest.mark.parametrize("convert", CONVERTERS, ids=lambda convert: convert.__name__)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_broken_converter_is_noticed(
    trials: Trials, convert: Converter, seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(f"{convert.__name__} {seed}")
    try:
        save_moe(tmp_path, convert(moe_blocks(), rng))
    except CheckpointError as error:
        assert "tensor" in str(error)
        trials.add(1)
        return
    told = told_by_a_load(tmp_path, caplog)
    assert any(word in told for word in ("does not fit this model", "hold the same numbers")), told
    trials.add(1)


def flip_a_bit(folder: Path, other: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut_a_file(folder: Path, other: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    os.truncate(path, rng.randrange(path.stat().st_size))


def lose_a_file(folder: Path, other: Path, rng: random.Random) -> None:
    rng.choice(sorted(folder.iterdir())).unlink()


def swap_a_file(folder: Path, other: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    shutil.copy(other / path.name, path)


def swap_two_files(folder: Path, other: Path, rng: random.Random) -> None:
    one, two = sorted(folder.glob("*.safetensors"))
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)


ACCIDENTS = [flip_a_bit, cut_a_file, lose_a_file, swap_a_file, swap_two_files]


@pytest.mark.parametrize("origin", [(2, "run"), (1, "another")], ids=["of another step", "of another run"])
@pytest.mark.parametrize("happen", ACCIDENTS, ids=lambda happen: happen.__name__)
def test_an_accident_is_noticed_and_the_file_named(
    happen: Callable[[Path, Path, random.Random], None], origin: tuple[int, str], tmp_path: Path
) -> None:
    other = save_moe(tmp_path / "other", moe_blocks(), *origin)
    for seed in range(10):
        folder = save_moe(tmp_path / str(seed), moe_blocks())
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        happen(folder, other, random.Random(seed))
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        spoilt = {name for name in before if after.get(name) != before[name]}
        problems = inspect_checkpoint(folder, 1, "xxh3").problems
        # a small JSON file may be the same in both: nothing happened. Another's manifest makes strangers of the rest
        named = {name for name in before if any(name in problem for problem in problems)}
        assert spoilt <= named or (spoilt == {"MANIFEST.json"} and named), (spoilt, problems)
        if spoilt:
            with pytest.raises(MegatronMoEError):
                newest(tmp_path / str(seed))


def test_a_sound_checkpoint_loads_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_moe(tmp_path, moe_blocks())
    assert told_by_a_load(tmp_path, caplog) == ""
    found = inspect_checkpoint(folder, 1, "xxh3")
    assert (found.problems, found.remarks) == ([], [])


def test_every_element_of_the_model_is_written(tmp_path: Path) -> None:
    save_moe(tmp_path, moe_blocks())
    target = moe_blocks()
    for block in target:
        block.tensor.fill_(float("nan"))
    newest(tmp_path).fill_all(target)
    for found, expected in zip(target, moe_blocks(), strict=True):
        assert torch.equal(found.tensor, expected.tensor)


def test_one_error_lists_all_differences(tmp_path: Path) -> None:
    save_moe(tmp_path, add_a_tensor(moe_blocks(), random.Random(0)))
    target = without(moe_blocks(), {"embedding.weight"})
    target = changed(target, pick(target, random.Random(1), "router"), global_shape=(9, 3))
    target += [whole_block(f"layers.{layer}.norm", torch.zeros(2)) for layer in range(5)]
    target += [Block("embedding.weight", (6, 3), (0, 0), torch.zeros(3, 3), primary=True)]
    with pytest.raises(CheckpointError) as caught:
        newest(tmp_path).fill_all(target)
    told = str(caught.value)
    assert "5 not in the checkpoint: layers.{0-4}.norm" in told
    assert "stored [4, 3], needed [9, 3]" in told
    assert "1 not filled exactly once: embedding.weight (nobody fills [3:6, 0:3])" in told
    assert "1 in the checkpoint only: layers.0.lora.weight" in told


@pytest.mark.goal("R14", ci=1, nightly=1, what="another number of experts: refused, with both numbers")
@pytest.mark.parametrize("experts", [2, 8])
def test_another_number_of_experts_is_refused_with_both_numbers(trials: Trials, experts: int, tmp_path: Path) -> None:
    save_moe(tmp_path, moe_blocks())
    with pytest.raises(CheckpointError, match=f"4 in the checkpoint, {experts} in the model"):
        newest(tmp_path).fill_all(moe_blocks(experts=experts), unused="name")
    trials.add(1)


def test_experts_are_never_left_over_even_where_other_tensors_may_be(tmp_path: Path) -> None:
    """A hash router has no weights whose shape would tell."""
    blocks = [block for block in moe_blocks() if "router" not in block.name]
    save_moe(tmp_path, [*blocks, whole_block("head.weight", torch.zeros(2))])
    reader = newest(tmp_path)
    assert reader.fill_all(emptied({"model": blocks})["model"], unused="name") == ["head.weight"]
    fewer = [block for block in blocks if ".3.w" not in block.name]
    with pytest.raises(CheckpointError, match=r"layers.\{0-1\}.mlp.experts \(4 in the checkpoint, 3 in the model\)"):
        reader.fill_all(fewer, unused="name")
    half = [block for block in blocks if block.name != expert(0, 1, "w2")]
    with pytest.raises(CheckpointError, match=r"in the checkpoint only: .*layers.0.mlp.experts.1.w2"):
        reader.fill_all(half, unused="name")


def test_long_lists_of_names_are_folded_and_lose_none() -> None:
    names = [expert(layer, number, weight) for layer in (0, 1, 3) for number in range(8) for weight in ("w1", "w2")]
    assert folded(names) == [
        "layers.{0-1,3}.mlp.experts.{0-7}.w1",
        "layers.{0-1,3}.mlp.experts.{0-7}.w2",
    ]
    assert folded([*names, "a.0", "norm"])[0] == "a.0"
    assert folded([name for name in names if name != expert(1, 5, "w1")]) == [
        "layers.1.mlp.experts.{0-4,6-7}.w1",
        "layers.{0,3}.mlp.experts.{0-7}.w1",
        "layers.{0-1,3}.mlp.experts.{0-7}.w2",
    ]
    assert folded([]) == []


def test_an_absent_expert_is_known_by_its_neighbours() -> None:
    names = {expert(0, number, weight) for number in range(4) for weight in ("w1", "w2")}
    assert absent_experts(names) == []
    lost = {expert(0, 3, "w2"), expert(0, 1, "w1")}
    assert set(absent_experts(names - lost)) == lost
