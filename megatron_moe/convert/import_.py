"""A Hugging Face folder as a project checkpoint at step 0: weights only, with the configuration that they ask for."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from megatron_moe.config.errors import CheckpointError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.convert.checkpoint_files import STEP, new_checkpoint
from megatron_moe.convert.family import ModelShape
from megatron_moe.convert.fused import Unfused
from megatron_moe.convert.hf_folder import HfFolder, read_json
from megatron_moe.convert.mapping import Mapping
from megatron_moe.convert.registry import family_of
from megatron_moe.convert.tensors import TensorSource

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What a run must say and a model does not know; a training run gives its own.
PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "training": {"global_batch_size": 1, "train_iters": 1},
    "optimizer": {"lr": 1e-4},
}

log = logging.getLogger(__name__)


def import_folder(folder: Path, root: Path) -> RunConfig:
    """Write the model in `folder` as step 0 of the checkpoint directory `root`; returns its configuration.

    Raises ConfigError if the project cannot express the model or `root` has a step 0, CheckpointError if tensors and
    config.json do not belong together, StorageError if the disk fails; nothing is left then.
    """
    source, mapping, shape = open_folder(folder)
    run = run_config(shape, folder, source.dtype(EMBEDDING) if EMBEDDING in source.names() else torch.float32)
    with new_checkpoint(root, mapping.checked_our_tensors(source, where=str(folder))) as sink:
        mapping.to_ours(source, sink, where=str(folder))
        sink.finish(run.to_json(), {"step": STEP, "imported_from": str(folder)}, {})
    log.info(
        "wrote step %d in %s; its config.json holds the model. Train on with --config %s --load %s --finetune, and a "
        "--seq-length, --global-batch-size, --train-iters and --lr of your own",
        STEP,
        root,
        root / f"step_{STEP:08d}" / "config.json",
        root,
    )
    return run


def open_folder(folder: Path) -> tuple[TensorSource, Mapping, ModelShape]:
    """The tensors of a folder under their names on disk, the mapping that they should fit, and the model."""
    config = read_json(folder / "config.json")
    family = family_of(config)
    shape = family.read_config(config)
    source = Unfused(HfFolder(folder), family.expert_names)
    _drop_tied_copy(source, shape, folder)
    return source, family.mapping(shape), shape


def _drop_tied_copy(source: Unfused, shape: ModelShape, folder: Path) -> None:
    """A tied head that some files repeat; it has to be the same."""
    if shape.model.untie_embeddings_and_output_weights or not {EMBEDDING, HEAD} <= set(source.names()):
        return
    if not torch.equal(source.read(EMBEDDING), source.read(HEAD)):
        raise CheckpointError(
            f"{folder}: config.json ties the head to the embedding, but {HEAD} differs from {EMBEDDING}; set "
            f'"tie_word_embeddings": false in config.json if the head is its own.'
        )
    source.without(HEAD)


def run_config(shape: ModelShape, folder: Path, dtype: torch.dtype) -> RunConfig:
    """A whole run around the model: its tokenizer where the folder has one, its precision as the weights'."""
    tables: dict[str, dict[str, Any]] = {
        "model": _fields(shape.model),
        "moe": _fields(shape.moe),
        "precision": {"dtype": "bf16" if dtype == torch.bfloat16 else "fp32"},
        "data": {"seq_length": shape.model.max_position_embeddings, **_tokenizer_options(folder)},
        **PLACEHOLDERS,
    }
    return RunConfig.from_dict(tables, origin="checkpoint")


def _fields(section: ModelConfig | MoEConfig) -> dict[str, Any]:
    return dataclasses.asdict(section)


def _tokenizer_options(folder: Path) -> dict[str, str]:
    if (folder / "tokenizer.json").is_file():
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder.resolve())}
    sentencepiece = folder / "tokenizer.model"
    if sentencepiece.is_file():
        return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(sentencepiece.resolve())}
    return {"tokenizer_type": "NullTokenizer"}
