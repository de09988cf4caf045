"""From the configuration to this rank's stages, on meta, then in memory."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from megatron_moe.config.run import RunConfig
from megatron_moe.config.stages import stage_sizes
from megatron_moe.layers.attention import AttentionShape
from megatron_moe.layers.recompute import Recomputation
from megatron_moe.models.gpt import GPTSpec, GPTStage
from megatron_moe.models.transformer import LayerSpec
from megatron_moe.moe.routers.router import Router
from megatron_moe.moe.sparse_layer import SparseLayer
from megatron_moe.optim.fully_sharded import Sharder, Unit
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.state import ParallelState
from megatron_moe.pipeline.partition import parts_of, stage_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def gpt_spec(config: RunConfig, vocab_size: int) -> GPTSpec:
    """The spec of every layer. vocab_size: ids of the tokenizer (or of --vocab-size)."""
    model = config.model
    relative = model.position_embedding_type == "relative"
    return GPTSpec(
        layers=(*_encoder_layers(config, vocab_size), *_decoder_layers(config, vocab_size)),
        hidden_size=model.hidden_size,
        vocab_size=vocab_size,
        padded_vocab_size=model.padded_vocab_size(vocab_size),
        tied=not model.untie_embeddings_and_output_weights,
        init_std=model.init_method_std,
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        dtype=DTYPES[config.precision.dtype],
        sequence_parallel=config.parallel.uses_sequence_parallel,
        tensor_overlap=config.parallel.tp_comm_overlap,
        recompute=_recomputation(config),
        relative_buckets=model.relative_attention_num_buckets if relative else 0,
        relative_distance=model.relative_attention_max_distance if relative else 0,
    )


def _recomputation(config: RunConfig) -> Recomputation:
    parallel = config.parallel
    if parallel.recompute_granularity == "full":
        number = parallel.recompute_num_layers or 1
        return Recomputation(1, first=number) if parallel.recompute_method == "block" else Recomputation(number)
    return Recomputation(modules=parallel.modules_to_recompute)


def _decoder_layers(config: RunConfig, vocab_size: int) -> list[LayerSpec]:
    """All layers of a decoder-only model, or those that look at the encoder's output too."""
    model = config.model
    before = model.encoder_num_layers
    layer = replace(
        _layer(config, vocab_size, model.num_layers, causal=True),
        cross_attention=before > 0,
    )
    pattern = config.moe.moe_layers(model.num_layers)
    return [
        replace(layer, index=before + number, moe=config.moe if sparse else None)
        for number, sparse in enumerate(pattern)
    ]


def _encoder_layers(config: RunConfig, vocab_size: int) -> list[LayerSpec]:
    """None in a decoder-only model."""
    number = config.model.encoder_num_layers
    layer = replace(_layer(config, vocab_size, max(1, number), causal=False), stream="encoder")
    pattern = config.encoder_moe.moe_layers(number)
    return [
        replace(layer, index=index, moe=config.encoder_moe if sparse else None) for index, sparse in enumerate(pattern)
    ]


def _layer(config: RunConfig, vocab_size: int, stack: int, *, causal: bool) -> LayerSpec:
    """A dense layer of a stack of so many."""
    model = config.model
    attention = AttentionShape(
        hidden_size=model.hidden_size,
        num_heads=model.num_attention_heads,
        num_groups=model.groups,
        head_dim=model.head_dim,
        causal=causal,
        rotary_width=model.rotary_dim if model.position_embedding_type == "rope" else 0,
        rotary_base=model.rotary_base,
        qk_norm=model.qk_layernorm,
        norm_epsilon=model.norm_epsilon,
        init_std=model.init_method_std,
        # residual branches start smaller, so that depth does not add variance (GPT-2)
        output_std=model.init_method_std / math.sqrt(2.0 * stack),
    )
    return LayerSpec(
        index=0,
        attention=attention,
        normalization=model.normalization,
        ffn_size=model.ffn_size,
        activation=model.activation,
        moe=None,
        dtype=DTYPES[config.precision.dtype],
        sequence_parallel=config.parallel.uses_sequence_parallel,
        vocab_size=vocab_size,
        seed=config.training.seed,
        cp_comm_type=config.parallel.cp_comm_type,
        recompute_modules=config.parallel.modules_to_recompute,
        rank_capacity=config.parallel.expert_rank_capacity_factor,
    )


def stage_parts(config: RunConfig) -> list[range]:
    """The layers of each stage of the pipeline, those of the encoder counted first."""
    return parts_of(stage_sizes(config.model, config.parallel))


def embedding_places(config: RunConfig) -> tuple[int, ...]:
    """Pipeline ranks that hold a copy of the embedding: where a stream begins, and where a tied head ends."""
    size, parts = config.parallel.pipeline_model_parallel_size, stage_parts(config)
    stages = {0}
    if config.model.encoder_num_layers:
        stages |= {number for number, part in enumerate(parts) if config.model.encoder_num_layers in part}
    if not config.model.untie_embeddings_and_output_weights:
        stages.add(len(parts) - 1)
    return tuple(sorted({stage % size for stage in stages}))


def build_stages(spec: GPTSpec, state: ParallelState, parts: Sequence[range] | None = None) -> list[GPTStage]:
    """This rank's stages on meta: shapes and layouts, no memory.

    parts: the layers of every stage of the pipeline, a multiple of its ranks; none = one stage a rank, even ones.
    """
    parts = parts or stage_layers(len(spec.layers), state.pp.size)
    return [GPTStage(spec, parts, number, state) for number in range(state.pp.rank, len(parts), state.pp.size)]


def initialise_stages(
    stages: list[GPTStage], state: ParallelState, seed: int, device: torch.device, sharder: Sharder | None = None
) -> None:
    """Give the stages memory and their first weights, which depend on names and global indices only.

    sharder: takes each layer when it has its weights, before the next one needs memory; for one stage.
    """
    for stage in stages:
        for name, layer in stage.layers.items():
            prefix = f"layers.{name}."
            materialise(layer, state, seed, device, prefix=prefix)
            if sharder is not None:
                sharder.shard(layer_units(layer, stage.spec.dtype), prefix)
        materialise(stage, state, seed, device)
        if sharder is not None:
            sharder.shard([Unit(stage, "dp_cp", stage.spec.dtype, lasting=True)])
    _share(stages)


def layer_units(layer: nn.Module, dtype: torch.dtype) -> list[Unit]:
    """What is gathered together of a layer: its dense part, then experts, then routers where they are wider."""
    units = [Unit(layer, "dp_cp", dtype)]
    for module in layer.modules():
        if isinstance(module, SparseLayer):
            units.append(Unit(module, "edp", dtype))
        elif isinstance(module, Router):
            units.append(Unit(module, "dp_cp", module.dtype))
    return units


def _share(stages: list[GPTStage]) -> None:
    """What several stages of a rank have in common is one parameter: one gradient, one place in the optimizer."""
    known: dict[str, nn.Parameter] = {}
    for stage in stages:
        for name, parameter in list(stage.named_parameters()):
            if name in known:
                room, _, leaf = name.rpartition(".")
                stage.get_submodule(room).register_parameter(leaf, known[name])
            known.setdefault(name, parameter)
