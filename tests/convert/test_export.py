"""Exported folders: the library loads them without a word, and they are what it would have written itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_moe.config.errors import CheckpointError, ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.convert.export import ExportOptions, export_model
from megatron_moe.convert.registry import FAMILIES
from tests.convert.samples import MemorySource, load_strictly, mapping_of, random_weights, run_of

FAMILY_NAMES = list(FAMILIES)


def export(run: RunConfig, family: str, folder: Path, **options: Any) -> MemorySource:
    source = MemorySource(random_weights(mapping_of(family, run), options.pop("stored", torch.float32)))
    export_model(source, run, folder, options=ExportOptions(model_type=family, **options), where="checkpoint")
    return source


def stored(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_library_loads_it_and_writes_the_same_bytes(family: str, tied: bool, tmp_path: Path) -> None:
    run = run_of(family, model={"untie_embeddings_and_output_weights": not tied})
    export(run, family, tmp_path / "ours")
    model = load_strictly(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    name = "model.safetensors"
    ours, theirs = stored(tmp_path / "ours" / name), stored(tmp_path / "theirs" / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_library_reads_every_value_of_the_config(family: str, tmp_path: Path) -> None:
    run = run_of(family, data={"seq_length": 48}, model={"init_method_std": 1})
    export(run, family, tmp_path / "hf")
    config = load_strictly(tmp_path / "hf").config
    wanted = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "num_experts": 4,
        "vocab_size": 99,
        "max_position_embeddings": 48,
        "rms_norm_eps": 1e-6,
        "initializer_range": 1.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": None,
        "bos_token_id": None,
    }
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.rope_parameters["rope_type"] == "default"
    if family == "qwen3_moe":
        assert (config.mlp_only_layers, config.decoder_sparse_step) == ([1], 1)
        assert (config.intermediate_size, config.moe_intermediate_size) == (56, 20)
    else:
        assert config.intermediate_size == 20


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_config_file_has_the_keys_of_both_majors(family: str, tmp_path: Path) -> None:
    export(run_of(family), family, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"] is None
    assert config["num_experts"] == config["num_local_experts"] == 4
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["architectures"] == [FAMILIES[family].architecture]
    floats = ("rms_norm_eps", "initializer_range", "attention_dropout", "router_aux_loss_coef", "rope_theta")
    assert all(isinstance(config[key], float) for key in floats)
    counts = ("num_experts_per_tok", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    assert all(type(config[key]) is int for key in counts)
    assert config["megatron_moe"]["moe"]["router_type"] == "top_k"


@pytest.mark.parametrize(
    ("moe", "choices", "renormalised"),
    [
        ({}, 2, True),
        ({"router_pre_softmax": True}, 2, False),
        ({"router_pre_softmax": True, "router_options": {"renormalise": "true"}}, 2, True),
        ({"router_pre_softmax": True, "router_options": {"renormalise": "false", "balance": "per_choice"}}, 2, False),
        ({"router_type": "switch"}, 1, False),
        ({"router_type": "gshard"}, 2, True),
        ({"router_type": "gshard", "router_options": {"renormalise": "none"}}, 2, False),
        ({"router_type": "st_moe", "router_topk": 3, "router_options": {"eval_policy": "all"}}, 3, True),
    ],
)
def test_router_becomes_two_keys(moe: dict[str, Any], choices: int, renormalised: bool, tmp_path: Path) -> None:
    export(run_of("qwen3_moe", moe=moe), "qwen3_moe", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["num_experts_per_tok"], config["norm_topk_prob"]) == (choices, renormalised)


def test_shards_hold_everything_and_the_index_says_where(tmp_path: Path) -> None:
    source = export(run_of("mixtral"), "mixtral", tmp_path / "hf", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 3
    found = {name: (file, tensor) for file in files for name, tensor in stored(tmp_path / "hf" / file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for _, tensor in found.values())
    assert index["metadata"]["total_size"] == 4 * index["metadata"]["total_parameters"]
    for file in files:
        with safe_open(tmp_path / "hf" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert sum(tensor.nbytes for _, tensor in found.values() if _ == file) <= 20_000
    assert set(source.reads.values()) == {1}
    load_strictly(tmp_path / "hf")


def test_a_tensor_over_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    export(run_of("mixtral"), "mixtral", tmp_path / "hf", max_shard_bytes=1)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == len(mapping_of("mixtral").their_shapes)
    load_strictly(tmp_path / "hf")


def test_half_precision_is_rounded_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = export(run_of("olmoe"), "olmoe", tmp_path / "hf", dtype="bf16")
    assert "tensors are rounded to bfloat16" in caplog.text
    found = stored(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(found["model.norm.weight"], source.tensors["final_norm.weight"].bfloat16())
    load_strictly(tmp_path / "hf", torch.bfloat16)


def test_precision_follows_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of("mixtral", precision={"dtype": "bf16"})
    export(run, "mixtral", tmp_path / "hf", stored=torch.bfloat16)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "rounded" not in caplog.text


def test_capacity_is_allowed_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of("mixtral", moe={"expert_capacity_factor": 1.25, "eval_capacity_factor": 2.0})
    export(run, "mixtral", tmp_path / "hf")
    assert "factor 1.25, evaluation 2.0" in caplog.text


def test_auto_takes_the_first_family_that_fits(tmp_path: Path) -> None:
    for family in FAMILY_NAMES:
        source = MemorySource(random_weights(mapping_of(family)))
        options = ExportOptions()
        assert export_model(source, run_of(family), tmp_path / family, options=options, where="x").model_type == family


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConfigError, match="exists already and is not overwritten"):
        export(run_of("mixtral"), "mixtral", tmp_path / "hf")
    assert list((tmp_path / "hf").iterdir()) == []


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    run = run_of("mixtral")
    source = MemorySource(random_weights(mapping_of("mixtral", run)))
    source.tensors["surprise"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="surprise"):
        export_model(source, run, tmp_path / "hf", options=ExportOptions(), where="checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(run_of("qwen3_moe"), "qwen3_moe", tmp_path / name, max_shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_a_vocabulary_left_to_the_tokenizer_is_read_from_it(tmp_path: Path) -> None:
    run = run_of("mixtral", model={"vocab_size": None}, data={"seq_length": 64, "tokenizer_type": "ByteTokenizer"})
    shape = mapping_of("mixtral").our_shapes | {"embedding.weight": (272, 32), "output.weight": (272, 32)}
    source = MemorySource({name: torch.zeros(size) for name, size in shape.items()})
    export_model(source, run, tmp_path / "hf", options=ExportOptions(), where="checkpoint")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (257, 256)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 256
    with pytest.raises(ConfigError, match="leave --no-tokenizer out"):
        export_model(source, run, tmp_path / "no", options=ExportOptions(with_tokenizer=False), where="checkpoint")


def test_a_null_tokenizer_leaves_no_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        export(run_of("mixtral"), "mixtral", tmp_path / "hf")
    assert "gets no tokenizer" in caplog.text
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
