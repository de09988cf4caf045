"""Folders that the library wrote become checkpoints and come back byte for byte; wrong ones are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe.checkpoint.load import CheckpointReader, find_checkpoint
from megatron_moe.config.errors import CheckpointError, ConfigError, DataError, MegatronMoEError
from megatron_moe.config.run import RunConfig
from megatron_moe.convert.export import ExportOptions, export_checkpoint
from megatron_moe.convert.import_ import import_folder
from megatron_moe.convert.registry import FAMILIES
from megatron_moe.parallel.state import ParallelState
from tests.convert.samples import PADDED, VOCAB, library_model

FAMILY_NAMES = list(FAMILIES)
WEIGHTS = "model.safetensors"


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; a value of ... removes its key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def read(root: Path) -> CheckpointReader:
    return find_checkpoint(root, None, ParallelState.alone().world)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the library's own save_pretrained writes, for each family; not to be changed."""
    root = tmp_path_factory.mktemp("library")
    for family in FAMILY_NAMES:
        library_model(family).save_pretrained(root / family)
    return {family: root / family for family in FAMILY_NAMES}


@pytest.fixture
def mixtral(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    copy = tmp_path / "mixtral"
    copy.mkdir()
    for file in folders["mixtral"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_library_folder_comes_back_byte_for_byte(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    run = import_folder(folders[family], tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back", options=ExportOptions(model_type=family))
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (folders[family] / WEIGHTS).read_bytes()
    assert run.model.rotary_base == 5e5
    reader = read(tmp_path / "ckpt")
    assert reader.step == 0
    assert reader.names("optim") == []
    assert RunConfig.from_json(reader.config_json) == run
    embedding = reader.logical("embedding.weight")
    assert embedding.shape == (run.model.padded_vocab_size(VOCAB), 32)
    assert not embedding[VOCAB:].any()
    assert PADDED != embedding.shape[0] == 128


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_exported_config_describes_the_same_model(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    import_folder(folders[family], tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back", options=ExportOptions(model_type=family))
    theirs = json.loads((folders[family] / "config.json").read_text())
    ours = json.loads((tmp_path / "back" / "config.json").read_text())
    # training only, or the version
    del theirs["router_aux_loss_coef"], theirs["transformers_version"]
    assert {key: ours.get(key, "absent") for key in theirs} == theirs


def test_shards_with_straddling_experts_and_fused_files_hold_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    for family in FAMILY_NAMES:
        model = library_model(family)
        model.save_pretrained(tmp_path / family / "sharded", max_shard_size="9KB")
        model.save_pretrained(tmp_path / family / "fused", save_original_format=False)
        index = json.loads((tmp_path / family / "sharded" / f"{WEIGHTS}.index.json").read_text())["weight_map"]
        assert len({file for name, file in index.items() if "layers.0" in name and ".experts." in name}) > 1
        assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / family / "fused" / WEIGHTS))
        for kind in ("sharded", "fused"):
            root = tmp_path / family / f"{kind}-ckpt"
            import_folder(tmp_path / family / kind, root)
            export_checkpoint(root, tmp_path / family / f"{kind}-back", options=ExportOptions(model_type=family))
            back = tmp_path / family / f"{kind}-back" / WEIGHTS
            assert back.read_bytes() == (folders[family] / WEIGHTS).read_bytes(), (family, kind)


def test_rotary_base_is_found_in_the_form_of_either_major(mixtral: Path, tmp_path: Path) -> None:
    edit_config(mixtral, rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    assert import_folder(mixtral, tmp_path / "five").model.rotary_base == 12345.0
    edit_config(mixtral, rope_parameters=..., rope_theta=23456, rope_scaling=None)
    assert import_folder(mixtral, tmp_path / "four").model.rotary_base == 23456.0
    edit_config(mixtral, rope_theta=...)
    assert import_folder(mixtral, tmp_path / "neither").model.rotary_base == 1e6


def test_tied_head_may_be_repeated_if_it_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    library_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    assert "lm_head.weight" not in weights
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / WEIGHTS)
    run = import_folder(folder, tmp_path / "ckpt")
    assert not run.model.untie_embeddings_and_output_weights
    assert "output.weight" not in read(tmp_path / "ckpt").names("model")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="config.json ties the head"):
        import_folder(folder, tmp_path / "other")


def test_dense_layers_become_a_layer_frequency(tmp_path: Path) -> None:
    for step, dense, wanted in ((2, [], "2"), (1, [0, 2], "2"), (1, [2], "1,1,0,1"), (1, [], "1"), (2, [1], "4")):
        folder = tmp_path / f"{step}{dense}"
        model = library_model("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=step, mlp_only_layers=dense)
        model.save_pretrained(folder)
        assert import_folder(folder, folder / "ckpt").moe.layer_freq == wanted


def test_types_stay_and_decide_the_precision(tmp_path: Path) -> None:
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float16, "fp32")):
        folder = tmp_path / word
        library_model("olmoe").to(dtype).save_pretrained(folder)
        assert import_folder(folder, folder / "ckpt").precision.dtype == word
        assert read(folder / "ckpt").logical("final_norm.weight").dtype == dtype


def test_norm_topk_prob_says_how_weights_are_made(folders: dict[str, Path], tmp_path: Path) -> None:
    assert import_folder(folders["olmoe"], tmp_path / "olmoe").moe.router_pre_softmax is True
    assert import_folder(folders["qwen3_moe"], tmp_path / "qwen").moe.router_pre_softmax is False


def spoil_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return spoil


def spoil_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def spoil_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


W2 = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (spoil_weights(lambda weights: weights.pop(W2)), CheckpointError, f"lacks the tensor {W2}"),
        (spoil_weights(lambda weights: weights.update(x=torch.ones(1))), CheckpointError, "has a tensor x"),
        (spoil_weights(lambda weights: weights.update({W2: torch.ones(3, 2)})), CheckpointError, f"{W2} has the shape"),
        (
            spoil_weights(lambda weights: weights.update({W2: torch.ones(32, 20, dtype=torch.int8)})),
            CheckpointError,
            "has the type I8",
        ),
        (spoil_config(model_type="llama"), ConfigError, "model_type is 'llama'"),
        (spoil_config(sliding_window=4096), ConfigError, "sliding_window is 4096"),
        (spoil_config(hidden_act="gelu"), ConfigError, "hidden_act is 'gelu'"),
        (spoil_config(quantization_config={"bits": 4}), ConfigError, "quantization_config"),
        (spoil_config(rope_theta=1.0), ConfigError, "contradicts itself"),
        (spoil_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ConfigError, "rope_scaling is"),
        (spoil_config(num_local_experts=..., num_experts=...), ConfigError, "no num_experts or num_local_experts"),
        (spoil_config(num_experts=8), ConfigError, "num_experts 8, num_local_experts 4"),
        (spoil_config(hidden_size="32"), ConfigError, "hidden_size is '32'"),
        (spoil_config(num_experts_per_tok=1), ConfigError, "num_experts_per_tok 1"),
        (spoil_config(num_experts_per_tok=9), ConfigError, "--moe-router-topk 9"),
        (spoil_config(num_key_value_heads=3), ConfigError, "--num-query-groups 3"),
        (spoil_pickle, CheckpointError, "can run code when opened"),
        (lambda folder: (folder / WEIGHTS).unlink(), DataError, "has neither model.safetensors nor"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0junkjunk"),
            CheckpointError,
            "cannot be read",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), DataError, "cannot be read as JSON"),
        (lambda folder: (folder / "config.json").unlink(), DataError, "there is no"),
    ],
)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(
    spoil: Callable[[Path], object], error: type[MegatronMoEError], told: str, mixtral: Path, tmp_path: Path
) -> None:
    spoil(mixtral)
    with pytest.raises(error, match=told.replace(".", r"\.")):
        import_folder(mixtral, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists() or not list((tmp_path / "ckpt").iterdir())


def test_a_layer_that_is_fused_and_not_is_refused(mixtral: Path, tmp_path: Path) -> None:
    weights = load_file(mixtral / WEIGHTS)
    save_file(weights | {"model.layers.0.mlp.experts.down_proj": torch.ones(4, 32, 20)}, mixtral / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w2\.weight is there twice"):
        import_folder(mixtral, tmp_path / "ckpt")


def test_an_existing_step_is_not_overwritten(mixtral: Path, tmp_path: Path) -> None:
    import_folder(mixtral, tmp_path / "ckpt")
    before = (tmp_path / "ckpt" / "step_00000000" / "MANIFEST.json").read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        import_folder(mixtral, tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / "step_00000000" / "MANIFEST.json").read_bytes() == before


def test_index_and_shards_have_to_agree(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    library_model("mixtral").save_pretrained(folder, max_shard_size="20KB")
    path = folder / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    whole = dict(index["weight_map"])
    for changed, error, told in (
        ({name: file for name, file in whole.items() if name != W2}, CheckpointError, "the index does not say so"),
        (whole | {"model.ghost": whole[W2]}, CheckpointError, "should be in it by the index"),
        (whole | {W2: "../elsewhere.safetensors"}, DataError, "no plain file name"),
        ({}, DataError, "has no weight_map"),
    ):
        path.write_text(json.dumps(index | {"weight_map": changed}))
        with pytest.raises(error, match=told):
            import_folder(folder, tmp_path / "ckpt")
    path.write_text(json.dumps(index))
    (folder / whole[W2]).unlink()
    with pytest.raises(CheckpointError, match=f"{whole[W2]} cannot be read"):
        import_folder(folder, tmp_path / "ckpt")


def test_tokenizer_of_the_folder_becomes_that_of_the_run(mixtral: Path, tmp_path: Path) -> None:
    assert import_folder(mixtral, tmp_path / "none").data.tokenizer_type == "NullTokenizer"
    (mixtral / "tokenizer.model").write_bytes(b"")
    data = import_folder(mixtral, tmp_path / "model").data
    assert (data.tokenizer_type, data.tokenizer_model) == ("SentencePieceTokenizer", str(mixtral / "tokenizer.model"))
    (mixtral / "tokenizer.json").write_text("{}")
    data = import_folder(mixtral, tmp_path / "json").data
    assert (data.tokenizer_type, data.tokenizer_model) == ("HuggingFaceTokenizer", str(mixtral))
