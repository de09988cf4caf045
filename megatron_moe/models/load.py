"""A trained model out of a checkpoint, for anything but training: evaluation, decoding, comparison."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.config.run import RunConfig
from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.models.gpt import GPTSpec, GPTStage
from megatron_moe.parallel.blocks import module_blocks
from megatron_moe.parallel.state import ParallelState


@dataclass(frozen=True)
class LoadedModel:
    """This rank's stages with their trained weights, and what they were made from."""

    config: RunConfig
    spec: GPTSpec
    stages: list[GPTStage]
    state: ParallelState
    device: torch.device
    step: int


def vocab_size_of(config: RunConfig, names: Mapping[str, Any]) -> int:
    """Ids of the vocabulary: what the run was told, or what it found in its tokenizer and saved."""
    return config.model.vocab_size or int(names["vocab_size"])


def load_model(
    root: Path,
    *,
    step: int | None = None,
    state: ParallelState | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """The newest valid checkpoint under `root`, or that of `step`, on any layout; alone when no state is given.

    dtype: None keeps the type that it was trained in.  Collective over the world.
    Raises NoCheckpointError or CheckpointError.
    """
    state = state or ParallelState.alone()
    device = device or torch.device("cpu")
    reader = find_checkpoint(root, step, state.world, device=device)
    config = RunConfig.from_json(reader.config_json, source=f"config.json of {reader.folder}")
    spec = gpt_spec(config, vocab_size_of(config, reader.state))
    kept = dtype or spec.dtype
    layers = tuple(replace(layer, dtype=kept, sequence_parallel=False) for layer in spec.layers)
    spec = replace(spec, dtype=kept, layers=layers, sequence_parallel=False)
    stages = build_stages(spec, state)
    initialise_stages(stages, state, config.training.seed, device)
    reader.fill_all(module_blocks(stages, state), cast=dtype is not None)
    for stage in stages:
        stage.eval().requires_grad_(False)
    return LoadedModel(config, spec, stages, state, device, reader.step)
