"""Writes the Megatron checkpoints here with megatron-core 0.16.1's own models, and the logits that they give.

pip install megatron-core==0.16.1 psutil && TORCHDYNAMO_DISABLE=1 python tests/golden/megatron/make_checkpoints.py

Each model is made on one process, with random values everywhere, and gives the expected logits there. megatron-core
itself cuts it for the other layouts: saved by its dist_checkpointing, loaded by models on more gloo ranks, and saved by
these, as torch_dist or as the files that Megatron-LM writes with --ckpt-format torch (megatron.training is on no
package index, so that layout is written here: one torch.save for each rank).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import save_file

HERE = Path(__file__).parent
VOCAB, PADDED, LENGTH, STEP = 43, 48, 12, 7

SHARED: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 6,
    "ffn_hidden_size": 20,
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_layers": 2, "normalization": "RMSNorm", "gated_linear_unit": True, "tied": True},
    "gelu": {"num_layers": 2, "normalization": "LayerNorm", "gated_linear_unit": False, "tied": False},
    "moe": {
        "num_layers": 3,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "tied": False,
        "qk_layernorm": True,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 10,
        "moe_router_topk": 2,
        "moe_layer_freq": [0, 1, 1],
        "moe_shared_expert_intermediate_size": 14,
        "moe_shared_expert_gate": True,
        "moe_aux_loss_coeff": 0.01,
    },
    # the layers of this one are alike, so that torch_dist may keep them in one tensor
    "bias": {
        "num_layers": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "tied": True,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 10,
        "moe_router_topk": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 1.5,
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
        "moe_router_load_balancing_type": "none",
    },
}


@dataclass(frozen=True)
class Case:
    """One checkpoint folder. metadata: what dist_checkpointing's savers are told."""

    name: str
    model: str
    format: str
    tp: int = 1
    pp: int = 1
    ep: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return max(self.tp, self.ep) * self.pp


CASES = [
    Case("dense-torch_dist", "dense", "torch_dist"),
    Case("dense-torch_dist-tp2-pp2", "dense", "torch_dist", tp=2, pp=2, metadata={"non_homogeneous_layers": True}),
    Case("dense-torch-tp2-pp2", "dense", "torch", tp=2, pp=2),
    Case("gelu-torch_dist-tp2", "gelu", "torch_dist", tp=2),
    Case("moe-torch_dist-ep2", "moe", "torch_dist", ep=2),
    Case("moe-torch_dist-singleton", "moe", "torch_dist", tp=2, metadata={"singleton_local_shards": True}),
    Case("moe-torch-ep2", "moe", "torch", ep=2),
    Case("moe-torch-tp2", "moe", "torch", tp=2),
    Case("bias-torch_dist-ep2", "bias", "torch_dist", ep=2),
]


def without_a_gpu() -> None:
    """megatron-core asks CUDA for a device in a few places; the answer here is the CPU."""
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.get_rng_state = lambda *_, **__: torch.zeros(1, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_, **__: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    parallel_random.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()
    moe_utils.te_general_gemm = None


def build(case: Case) -> GPTModel:
    fields = {**SHARED, **MODELS[case.model]}
    tied = fields.pop("tied")
    config = TransformerConfig(
        **fields,
        activation_func=torch.nn.functional.silu if fields["gated_linear_unit"] else torch.nn.functional.gelu,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.tp,
        pipeline_dtype=torch.float32,
        moe_token_dispatcher_type="allgather",
    )
    if config.num_moe_experts and isinstance(config.moe_layer_freq, list):
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    else:
        spec = get_gpt_layer_local_spec(
            config.num_moe_experts, False, config.qk_layernorm, normalization=config.normalization
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=PADDED,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        rotary_base=20000,
    ).eval()


def arguments(case: Case) -> argparse.Namespace:
    """What Megatron-LM's parser would have in it, as far as the model goes, and some of the rest."""
    fields = {**SHARED, **MODELS[case.model]}
    gated, tied, experts = (fields.pop(name, None) for name in ("gated_linear_unit", "tied", "num_moe_experts"))
    for name in ("layernorm_epsilon", "use_cpu_initialization", "bias_activation_fusion"):
        del fields[name]
    return argparse.Namespace(
        **{
            **fields,
            "num_experts": experts,
            "untie_embeddings_and_output_weights": not tied,
            "norm_epsilon": 1e-5,
            "group_query_attention": True,
            "swiglu": gated,
            "bias_gelu_fusion": False,
            "position_embedding_type": "rope",
            "rotary_base": 20000,
            "rotary_percent": 1.0,
            "max_position_embeddings": 64,
            "seq_length": 32,
            "vocab_size": VOCAB,
            "padded_vocab_size": PADDED,
            "make_vocab_size_divisible_by": 8,
            "tensor_model_parallel_size": case.tp,
            "pipeline_model_parallel_size": case.pp,
            "expert_model_parallel_size": case.ep,
            "expert_tensor_parallel_size": case.tp,
            "params_dtype": torch.float32,
            "bf16": False,
            "fp16": False,
            "init_method_std": 0.02,
            "attention_backend": AttnBackend.auto,
            "ckpt_format": case.format,
            "transformer_impl": "local",
            "data_path": ["corpus_text_document"],
            "lr": 1e-4,
        }
    )


def join(rank: int, world: int, store: str, case: Case) -> None:
    torch.set_num_threads(1)
    without_a_gpu()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.tp,
    )
    torch.manual_seed(0)


def random_values(model: GPTModel) -> None:
    made = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=made) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=made) * 0.2)


def state(model: GPTModel, case: Case) -> dict[str, Any]:
    metadata = dict(case.metadata)
    found: dict[str, Any] = model.sharded_state_dict(metadata=metadata)
    return found


def original(rank: int, store: str, name: str, folder: str) -> None:
    """The model on one process: its checkpoint, to be cut, and its logits."""
    case = Case(name, name, "torch_dist", metadata={"non_homogeneous_layers": True})
    join(rank, 1, store, case)
    model = build(case)
    random_values(model)
    tokens = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(LENGTH).expand_as(tokens)
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
    with torch.no_grad():
        logits = model(tokens, positions, mask)
    save_file({"tokens": tokens, "logits": logits.float().contiguous()}, HERE / f"{name}.safetensors")
    dist_checkpointing.save(state(model, case), folder, ("torch_dist", 1))


def cut(rank: int, store: str, case: Case, whole: str, made: str) -> None:
    """Load the whole on this layout and save it in the case's format."""
    join(rank, case.world, store, case)
    model = build(case)
    plain = Case("", case.model, "torch_dist", metadata={"non_homogeneous_layers": True})
    loaded = dist_checkpointing.load(state(model, plain), whole)
    model.load_state_dict({name: value for name, value in loaded.items() if "." in name}, strict=False)
    folder = Path(made) / f"iter_{STEP:07d}"
    common = {"args": arguments(case), "checkpoint_version": 3.0, "iteration": STEP}
    if case.format == "torch_dist":
        folder.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save({**state(model, case), **common}, str(folder), ("torch_dist", 1))
    else:
        parts = [f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"]
        if case.pp > 1:
            parts.append(f"{parallel_state.get_pipeline_model_parallel_rank():03d}")
        if case.ep > 1:
            parts.append(f"{parallel_state.get_expert_model_parallel_rank():03d}")
        own = folder / "_".join(parts)
        own.mkdir(parents=True)
        weights = model.state_dict_for_save_checkpoint()
        torch.save({**common, "model": weights}, own / "model_optim_rng.pt")
    torch.distributed.barrier()
    if rank == 0:
        (Path(made) / "latest_checkpointed_iteration.txt").write_text(str(STEP))


def main() -> int:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        for name in MODELS:
            whole = Path(scratch) / name
            whole.mkdir()
            mp.start_processes(original, (f"{scratch}/{name}-store", name, str(whole)), nprocs=1, start_method="fork")
            for case in (case for case in CASES if case.model == name):
                shutil.rmtree(HERE / case.name, ignore_errors=True)
                # .metadata remembers where it was written
                store, made = f"{scratch}/{case.name}-store", f"{scratch}/{case.name}"
                mp.start_processes(cut, (store, case, str(whole), made), nprocs=case.world, start_method="fork")
                shutil.copytree(made, HERE / case.name)
                print("wrote", case.name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
