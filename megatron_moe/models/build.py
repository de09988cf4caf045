"""From the configuration to this rank's stages, on meta, then in memory."""

import math

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.layers.attention import AttentionShape
from megatron_moe.models.gpt import GPTSpec, GPTStage
from megatron_moe.models.transformer import LayerSpec
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.partition import stage_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def gpt_spec(config: RunConfig, vocab_size: int) -> GPTSpec:
    """The spec of every layer. vocab_size: ids of the tokenizer (or of --vocab-size)."""
    model = config.model
    dtype = DTYPES[config.precision.dtype]
    attention = AttentionShape(
        hidden_size=model.hidden_size,
        num_heads=model.num_attention_heads,
        num_groups=model.groups,
        head_dim=model.head_dim,
        causal=True,
        rotary_width=model.rotary_dim if model.position_embedding_type == "rope" else 0,
        rotary_base=model.rotary_base,
        qk_norm=model.qk_layernorm,
        norm_epsilon=model.norm_epsilon,
        init_std=model.init_method_std,
        # residual branches start smaller, so that depth does not add variance (GPT-2)
        output_std=model.init_method_std / math.sqrt(2.0 * model.num_layers),
    )
    sequence_parallel = config.parallel.uses_sequence_parallel
    layers = tuple(
        LayerSpec(
            index=index,
            attention=attention,
            normalization=model.normalization,
            ffn_size=model.ffn_size,
            activation=model.activation,
            moe=config.moe if sparse else None,
            dtype=dtype,
            sequence_parallel=sequence_parallel,
            vocab_size=vocab_size,
            seed=config.training.seed,
        )
        for index, sparse in enumerate(config.moe.moe_layers(model.num_layers))
    )
    return GPTSpec(
        layers=layers,
        hidden_size=model.hidden_size,
        vocab_size=vocab_size,
        padded_vocab_size=model.padded_vocab_size(vocab_size),
        tied=not model.untie_embeddings_and_output_weights,
        init_std=model.init_method_std,
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        recompute=config.parallel.recompute_granularity == "full",
    )


def build_stages(spec: GPTSpec, state: ParallelState) -> list[GPTStage]:
    """This rank's stages on meta: shapes and layouts, no memory."""
    parts = stage_layers(len(spec.layers), state.pp.size)
    layers = parts[state.pp.rank]
    return [GPTStage(spec, layers, state, first=state.pp.is_first, last=state.pp.is_last)]


def initialise_stages(stages: list[GPTStage], state: ParallelState, seed: int, device: torch.device) -> None:
    """Give the stages memory and their first weights, which depend on names and global indices only."""
    for stage in stages:
        materialise(stage, state, seed, device)
