"""Tiny models for the converter's tests: configurations, random weights, and models of the library itself."""

from __future__ import annotations

from collections.abc import Mapping as TableMapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.convert.family import ModelShape
from megatron_moe.convert.mapping import Mapping
from megatron_moe.convert.registry import FAMILIES

VOCAB, PADDED = 99, 112  # 99 ids, padded to a multiple of 16

# what makes each tiny model one of its family; every size differs from every other
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 12,
    "ffn_hidden_size": 56,
    "norm_epsilon": 1e-6,
    "rotary_base": 5e5,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": 16,
}
MOE = {"num_experts": 4, "router_topk": 2, "ffn_hidden_size": 20}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": {"model": {}, "moe": {}},
    # an OLMoE head is hidden size / heads wide
    "olmoe": {"model": {"qk_layernorm": "projection", "kv_channels": 8}, "moe": {"router_pre_softmax": True}},
    "qwen3_moe": {"model": {"qk_layernorm": "head", "num_layers": 3}, "moe": {"layer_freq": "1,0,1"}},
}
LIBRARY: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"head_dim": 12, "intermediate_size": 20, "num_local_experts": 4}),
    "olmoe": ("Olmoe", {"intermediate_size": 20, "num_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 12,
            "intermediate_size": 56,
            "moe_intermediate_size": 20,
            "num_experts": 4,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "num_hidden_layers": 3,
        },
    ),
}


def run_of(
    family: str,
    *,
    model: TableMapping[str, Any] | None = None,
    moe: TableMapping[str, Any] | None = None,
    **sections: Any,
) -> RunConfig:
    """A tiny run of a family, with changes."""
    changes = CHANGES[family]
    return RunConfig.from_dict(
        {
            "model": {**MODEL, **changes["model"], **(model or {})},
            "moe": {**MOE, **changes["moe"], **(moe or {})},
            "data": {"seq_length": 64},
            "training": {"global_batch_size": 1, "train_iters": 1},
            "optimizer": {"lr": 1e-3},
            **sections,
        },
        # as read from a checkpoint: options without effect are no error
        origin="checkpoint",
    )


def shape_of(run: RunConfig) -> ModelShape:
    return ModelShape(model=run.model, moe=run.moe, vocab_size=VOCAB)


def mapping_of(family: str, run: RunConfig | None = None) -> Mapping:
    return FAMILIES[family].mapping(shape_of(run or run_of(family)))


class MemorySource:
    """A TensorSource over a dict, which counts how often each tensor was read."""

    def __init__(self, tensors: TableMapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.reads: dict[str, int] = dict.fromkeys(tensors, 0)

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self.tensors[name].clone()


class MemorySink:
    """A TensorSink that keeps everything."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        assert name not in self.tensors
        self.tensors[name] = tensor.clone()


def random_weights(mapping: Mapping, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random value for every element of every project tensor (norms too), zeros in the padding."""
    made = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=made).to(dtype) for name, shape in mapping.our_shapes.items()}
    for name in {"embedding.weight", "output.weight"} & set(weights):
        weights[name][VOCAB:] = 0
    return weights


def library_model(family: str, **changes: Any) -> Any:
    """A model of the library with random values everywhere, norms too."""
    word, keys = LIBRARY[family]
    config = getattr(transformers, f"{word}Config")(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **keys,
            **changes,
        }
    )
    torch.manual_seed(2)
    model = getattr(transformers, f"{word}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def load_strictly(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The library's own loading; no key may be missing, left over or of another shape."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, found = loaded
    problems = {name: value for name, value in found.items() if value}
    assert not problems, problems
    return model.eval()
