"""Checkpoints that megatron-core 0.16.1 wrote, on several layouts and in both formats, give megatron-core's logits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.config.errors import CheckpointError, ConfigError
from megatron_moe.convert.megatron.import_ import MegatronOptions, import_megatron
from tests.convert.megatron.samples import (
    ALLOWED,
    CASES,
    GOLDEN,
    change_metadata,
    change_ranks,
    check_logits,
    copy_of,
    open_here,
    weights_of,
)


@pytest.mark.parametrize("case", CASES)
def test_our_model_gives_the_logits_of_megatron_core(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_here(monkeypatch)
    run = import_megatron(GOLDEN / case, tmp_path / "ckpt", ALLOWED)
    check_logits(tmp_path / "ckpt", run, case.split("-")[0])
    assert not list(tmp_path.glob(".megatron-import-*"))


def test_layouts_and_formats_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_here(monkeypatch)
    for model in {case.split("-")[0] for case in CASES}:
        alike = [case for case in CASES if case.startswith(f"{model}-")]
        found = []
        for case in alike:
            import_megatron(GOLDEN / case, tmp_path / case, ALLOWED)
            found.append(weights_of(tmp_path / case))
        for other in found[1:]:
            assert other.keys() == found[0].keys()
            assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())


def as_transformer_engine(name: str) -> str:
    """A name of the local modules as Transformer Engine's have it: norms within products, experts within one."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    parts = name.split(".")
    if "local_experts" in parts:
        at = parts.index("local_experts")
        return ".".join([*parts[:at], parts[at + 2], parts[at + 3] + parts[at + 1]])
    return name


def test_names_of_transformer_engine_mean_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_here(monkeypatch)
    folder = copy_of("moe-torch-ep2", tmp_path)

    def rename(_: str, state: dict[str, Any]) -> None:
        state["model"] = {as_transformer_engine(name): value for name, value in state["model"].items()}
        norm = state["model"].pop("decoder.layers.0.pre_mlp_layernorm.weight")
        state["model"]["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"] = norm
        state["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"scales")

    change_ranks(folder, rename)
    import_megatron(folder, tmp_path / "renamed", ALLOWED)
    import_megatron(GOLDEN / "moe-torch-ep2", tmp_path / "plain", ALLOWED)
    renamed, plain = weights_of(tmp_path / "renamed"), weights_of(tmp_path / "plain")
    assert renamed.keys() == plain.keys()
    assert all(torch.equal(renamed[name], plain[name]) for name in plain)


def test_types_stay_and_decide_the_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in float32 among bfloat16, in an order that would leave some of them unaligned."""
    open_here(monkeypatch)
    folder = copy_of("dense-torch-tp2-pp2", tmp_path)

    def narrow(_: str, state: dict[str, Any]) -> None:
        for name, value in state["model"].items():
            if isinstance(value, torch.Tensor) and "norm" not in name:
                state["model"][name] = value.bfloat16()

    change_ranks(folder, narrow)
    run = import_megatron(folder, tmp_path / "ckpt", ALLOWED)
    import_megatron(GOLDEN / "dense-torch-tp2-pp2", tmp_path / "wide", ALLOWED)
    narrow_weights, wide = weights_of(tmp_path / "ckpt"), weights_of(tmp_path / "wide")
    assert run.precision.dtype == "bf16"
    for name, tensor in wide.items():
        wanted = tensor if "norm" in name else tensor.bfloat16()
        assert torch.equal(narrow_weights[name], wanted), name


def test_all_rows_of_the_vocabulary_are_kept_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_here(monkeypatch)
    folder = copy_of("dense-torch-tp2-pp2", tmp_path)
    told = import_megatron(folder, tmp_path / "told", MegatronOptions(pickles_allowed=True, vocab_size=40))
    assert told.model.vocab_size == 40
    assert not weights_of(tmp_path / "told")["embedding.weight"][40:].any()
    with pytest.raises(ConfigError, match="--vocab-size 49 is more than the 48 rows"):
        import_megatron(folder, tmp_path / "more", MegatronOptions(pickles_allowed=True, vocab_size=49))
    # the saved vocab_size, 43, counts no end-of-document id
    assert import_megatron(folder, tmp_path / "all", ALLOWED).model.vocab_size == 48
    assert weights_of(tmp_path / "all")["embedding.weight"][43:48].any()


def drop(rank: str, name: str) -> Any:
    return lambda where, state: where == rank and state["model"].pop(name)


def add(rank: str, name: str, value: Any) -> Any:
    return lambda where, state: where == rank and state["model"].update({name: value})


def shift(rank: str, name: str) -> Any:
    return lambda where, state: where == rank and state["model"][name].add_(1)


def rename_chunks(_: str, state: dict[str, Any]) -> None:
    state["model0"] = state.pop("model")


def another_step(where: str, state: dict[str, Any]) -> None:
    state["iteration"] += where == "mp_rank_01_001"


FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
NORM = "decoder.layers.0.input_layernorm.weight"
EXPERT = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"


@pytest.mark.parametrize(
    ("case", "change", "told"),
    [
        ("moe-torch-ep2", drop("mp_rank_00_001", EXPERT), r"lacks the tensor .*layers\.1\.mlp\.experts\.3\.linear_fc2"),
        ("dense-torch-tp2-pp2", drop("mp_rank_01_001", FC1), r"layers\.1\.mlp\.linear_fc1\.weight is on .* \[0\] only"),
        ("dense-torch-tp2-pp2", add("mp_rank_00_000", "new.weight", torch.ones(2)), "has a tensor new.weight"),
        ("dense-torch-tp2-pp2", add("mp_rank_00_000", "new", 3), "new is a int, expected a tensor"),
        ("dense-torch-tp2-pp2", add("mp_rank_00_000", FC1, torch.ones(3, 16)), r"linear_fc1.*\(3, 16\) on"),
        ("dense-torch-tp2-pp2", add("mp_rank_01_001", NORM, torch.ones(3)), "layers.1.input_layernorm.weight sho"),
        ("dense-torch-tp2-pp2", add("mp_rank_01_001", FC1, torch.ones(20, 16, dtype=torch.int8)), "has the type I8"),
        ("dense-torch-tp2-pp2", shift("mp_rank_01_001", NORM), "layers.1.input_layernorm.weight should be the same"),
        ("moe-torch-ep2", shift("mp_rank_00_001", "decoder.layers.1.mlp.router.weight"), "router.weight should be"),
        ("dense-torch-tp2-pp2", shift("mp_rank_01_001", "output_layer.weight"), "tie the head to the embedding"),
        ("dense-torch-tp2-pp2", add("mp_rank_00_000", "decoder.layers.7.x", torch.ones(1)), r"has the layers \[0, 7\]"),
        ("dense-torch-tp2-pp2", rename_chunks, "interleaved pipeline stages"),
        ("dense-torch-tp2-pp2", another_step, "mixes files of several saves"),
        ("dense-torch-tp2-pp2", lambda _, state: state.pop("args"), "holds no args"),
    ],
)
def test_what_is_missing_extra_or_different_in_a_rank_is_named(
    case: str, change: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_here(monkeypatch)
    folder = copy_of(case, tmp_path)
    change_ranks(folder, change)
    with pytest.raises(CheckpointError, match=told):
        import_megatron(folder, tmp_path / "ckpt", ALLOWED)
    assert not (tmp_path / "ckpt").exists() or not list((tmp_path / "ckpt").iterdir())


def test_a_rank_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_here(monkeypatch)
    folder = copy_of("dense-torch-tp2-pp2", tmp_path)
    for path in (folder / "mp_rank_01_000").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="mp_rank_01_000 lacks model_optim_rng.pt"):
        import_megatron(folder, tmp_path / "ckpt", ALLOWED)
    (folder / "mp_rank_01_000").rmdir()
    with pytest.raises(CheckpointError, match=r"missing \(tp, pp, ep\) \(1, 0, 0\)"):
        import_megatron(folder, tmp_path / "ckpt", ALLOWED)


QKV = "decoder.layers.self_attention.linear_qkv.weight"


def without_a_piece(metadata: Any) -> None:
    del metadata.state_dict_metadata[QKV].chunks[1]


def twice_a_piece(metadata: Any) -> None:
    metadata.state_dict_metadata[QKV].chunks.append(metadata.state_dict_metadata[QKV].chunks[1])


def without_a_tensor(metadata: Any) -> None:
    del metadata.state_dict_metadata[QKV]


def one_more(metadata: Any) -> None:
    metadata.state_dict_metadata[f"{QKV}.more"] = metadata.state_dict_metadata[QKV]
    for index, place in list(metadata.storage_data.items()):
        if index.fqn == QKV:
            metadata.storage_data[type(index)(f"{QKV}.more", index.offset)] = place


def more_layers(metadata: Any) -> None:
    metadata.state_dict_metadata[QKV].size = torch.Size([3, 48, 16])


def no_place(metadata: Any) -> None:
    metadata.storage_data = {key: place for key, place in metadata.storage_data.items() if key.fqn != QKV}


def elsewhere(metadata: Any) -> None:
    for index, place in metadata.storage_data.items():
        if index.fqn == QKV:
            place.relative_path = "../../secret"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_a_piece, r"linear_qkv.weight \[1\]: pieces are missing"),
        (twice_a_piece, r"linear_qkv.weight \[1\]: two pieces hold the same"),
        (without_a_tensor, "lacks the tensor decoder.layers.0.self_attention.linear_qkv.weight"),
        (one_more, "has a tensor decoder.layers.0.self_attention.linear_qkv.weight.more"),
        (more_layers, "is no stack of 2 layers"),
        (no_place, "says of no file that it holds"),
        (elsewhere, "which is no plain file name"),
    ],
)
def test_what_is_missing_extra_or_different_in_torch_dist_is_named(
    change: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_here(monkeypatch)
    folder = copy_of("dense-torch_dist", tmp_path)
    change_metadata(folder, change)
    with pytest.raises(CheckpointError, match=told):
        import_megatron(folder, tmp_path / "ckpt", ALLOWED)
    assert not (tmp_path / "ckpt").exists() or not list((tmp_path / "ckpt").iterdir())


def test_optimizer_state_is_ignored_by_name_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_here(monkeypatch)
    folder = copy_of("dense-torch_dist", tmp_path)

    def rename(metadata: Any) -> None:
        told = metadata.state_dict_metadata
        told[f"optimizer.state.exp_avg.{QKV}"] = told[QKV]

    change_metadata(folder, rename)
    with caplog.at_level("INFO"):
        import_megatron(folder, tmp_path / "ckpt", ALLOWED)
    assert "ignored: 1 entries, optimizer state" in caplog.text
    assert "extra state of Transformer Engine" in caplog.text
    with pytest.raises(ConfigError, match="--with-optimizer: only weights"):
        import_megatron(folder, tmp_path / "other", MegatronOptions(pickles_allowed=True, with_optimizer=True))
