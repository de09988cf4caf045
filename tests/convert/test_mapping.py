"""Mappings as data: each part is where it should be, both directions are exact, and memory stays that of one tensor."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from megatron_moe.config.errors import CheckpointError
from megatron_moe.convert.mapping import Mapping, Part, Rule, stacked, whole
from megatron_moe.convert.registry import FAMILIES
from tests.convert.samples import PADDED, VOCAB, MemorySink, MemorySource, mapping_of, random_weights, run_of

FAMILY_NAMES = list(FAMILIES)


def to_theirs(mapping: Mapping, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    sink = MemorySink()
    mapping.to_theirs(MemorySource(weights), sink, dtype=torch.float32, where="checkpoint")
    return sink.tensors


def to_ours(mapping: Mapping, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    sink = MemorySink()
    mapping.to_ours(MemorySource(theirs), sink, where="folder")
    return sink.tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_round_trip_is_bit_equal(family: str, tied: bool) -> None:
    mapping = mapping_of(family, run_of(family, model={"untie_embeddings_and_output_weights": not tied}))
    weights = random_weights(mapping)
    theirs = to_theirs(mapping, weights)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == mapping.their_shapes
    assert ("lm_head.weight" in theirs) is not tied
    back = to_ours(mapping, theirs)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_heads_are_numbered_group_by_group() -> None:
    mapping = mapping_of("mixtral")
    weights = random_weights(mapping)
    theirs = to_theirs(mapping, weights)
    groups, queries, width, hidden = 2, 2, 12, 32
    qkv, output = weights["layers.1.attention.qkv"], weights["layers.1.attention.output"]
    prefix = "model.layers.1.self_attn"
    for group in range(groups):
        for channel in range(width):
            row = group * width + channel
            assert torch.equal(theirs[f"{prefix}.k_proj.weight"][row], qkv[group, queries, channel])
            assert torch.equal(theirs[f"{prefix}.v_proj.weight"][row], qkv[group, queries + 1, channel])
            for query in range(queries):
                row = (group * queries + query) * width + channel
                assert torch.equal(theirs[f"{prefix}.q_proj.weight"][row], qkv[group, query, channel])
                assert torch.equal(theirs[f"{prefix}.o_proj.weight"][:, row], output[:, group, query, channel])
    assert theirs[f"{prefix}.o_proj.weight"].shape == (hidden, groups * queries * width)


def test_gate_comes_before_up_in_each_expert() -> None:
    mapping = mapping_of("mixtral")
    weights = random_weights(mapping)
    theirs = to_theirs(mapping, weights)
    for expert in range(4):
        names = [f"model.layers.0.block_sparse_moe.experts.{expert}.w{number}.weight" for number in (1, 2, 3)]
        gate, down, up = (theirs[name] for name in names)
        assert torch.equal(gate, weights[f"layers.0.mlp.experts.{expert}.w1"][0])
        assert torch.equal(up, weights[f"layers.0.mlp.experts.{expert}.w1"][1])
        assert torch.equal(down, weights[f"layers.0.mlp.experts.{expert}.w2"])


def test_norm_over_the_projection_has_the_order_of_the_heads() -> None:
    mapping = mapping_of("olmoe")
    weights = random_weights(mapping)
    theirs = to_theirs(mapping, weights)
    ours = weights["layers.0.attention.q_norm.weight"]
    wanted = [ours[group, query, channel] for group in range(2) for query in range(2) for channel in range(8)]
    assert theirs["model.layers.0.self_attn.q_norm.weight"].tolist() == [float(value) for value in wanted]


def test_dense_layers_stay_where_they_are() -> None:
    names = set(mapping_of("qwen3_moe").their_shapes)
    assert "model.layers.1.mlp.gate_proj.weight" in names
    assert "model.layers.1.mlp.gate.weight" not in names
    assert {"model.layers.0.mlp.gate.weight", "model.layers.2.mlp.experts.3.up_proj.weight"} <= names


def test_vocabulary_padding_is_cut_and_comes_back_as_zeros() -> None:
    mapping = mapping_of("mixtral")
    weights = random_weights(mapping)
    weights["embedding.weight"][VOCAB:] = 7.0
    theirs = to_theirs(mapping, weights)
    assert theirs["model.embed_tokens.weight"].shape[0] == VOCAB
    back = to_ours(mapping, theirs)["embedding.weight"]
    assert back.shape[0] == PADDED
    assert torch.equal(back[:VOCAB], weights["embedding.weight"][:VOCAB])
    assert not back[VOCAB:].any()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("missing", "lacks the tensor layers.0.mlp.experts.2.w2"),
        ("extra", "has a tensor layers.9.surprise"),
        ("shape", "tensor layers.0.attention.qkv has the shape"),
    ],
)
def test_first_wrong_tensor_is_named_before_anything_is_written(change: str, told: str) -> None:
    mapping = mapping_of("mixtral")
    weights = random_weights(mapping)
    if change == "missing":
        del weights["layers.0.mlp.experts.2.w2"]
    if change == "extra":
        weights["layers.9.surprise"] = torch.zeros(3)
    if change == "shape":
        weights["layers.0.attention.qkv"] = torch.zeros(2, 4, 12, 31)
    sink = MemorySink()
    with pytest.raises(CheckpointError, match=told):
        mapping.to_theirs(MemorySource(weights), sink, dtype=torch.float32, where="checkpoint")
    assert not sink.tensors


def test_each_tensor_is_read_once() -> None:
    mapping = mapping_of("qwen3_moe")
    source = MemorySource(random_weights(mapping))
    mapping.to_theirs(source, MemorySink(), dtype=torch.bfloat16, where="checkpoint")
    assert set(source.reads.values()) == {1}


class CountingSource(MemorySource):
    """Knows how many bytes of what it handed out are still alive."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__(weights)
        self.alive: dict[int, int] = {}
        self.peak = 0

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        key = len(self.reads) + sum(self.reads.values())
        storage = tensor.untyped_storage()
        self.alive[key] = storage.nbytes()
        weakref.finalize(storage, self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return tensor


class ForgettingSink:
    def write(self, name: str, tensor: Tensor) -> None:
        pass


def test_memory_is_that_of_one_tensor_in_both_directions() -> None:
    mapping = mapping_of("qwen3_moe")
    weights = random_weights(mapping)
    theirs = to_theirs(mapping, weights)
    gc.disable()
    try:
        source = CountingSource(weights)
        mapping.to_theirs(source, ForgettingSink(), dtype=torch.float32, where="checkpoint")
        assert source.peak == max(tensor.nbytes for tensor in weights.values())
        back = CountingSource(theirs)
        mapping.to_ours(back, ForgettingSink(), where="folder")
        assert back.peak == max(tensor.nbytes for tensor in theirs.values())
    finally:
        gc.enable()


def test_parts_of_different_types_meet_in_one_that_holds_both() -> None:
    mapping = Mapping((stacked("ours", (2, 3), "gate", "up"),))
    theirs = {"gate": torch.tensor([1.0, 2.0, 3.0]).bfloat16(), "up": torch.tensor([0.1, 0.2, 0.3])}
    back = to_ours(mapping, theirs)["ours"]
    assert back.dtype == torch.float32
    assert torch.equal(back[1], theirs["up"])


def test_widest_types_are_written_first() -> None:
    mapping = Mapping((whole("a", (2,), "a"), whole("b", (2,), "b"), whole("c", (2,), "c")))
    theirs = {"a": torch.zeros(2).bfloat16(), "b": torch.zeros(2), "c": torch.zeros(2).bfloat16()}
    assert list(to_ours(mapping, theirs)) == ["b", "a", "c"]


def test_a_part_that_does_not_fit_is_refused_when_it_is_written_down() -> None:
    with pytest.raises(ValueError, match="is no part of"):
        Rule("ours", (2, 3), (Part("theirs", (4,), 0, 0, 1),))
    with pytest.raises(ValueError, match="is no part of"):
        Rule("ours", (2, 3), (Part("theirs", (6,), 0, 1, 2),))
