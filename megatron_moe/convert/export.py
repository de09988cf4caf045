"""A project checkpoint as a Hugging Face folder, tensor by tensor: nothing is ever in memory but one of them."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.load import find_checkpoint
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.convert.checkpoint_files import CheckpointSource
from megatron_moe.convert.family import Family, ModelShape
from megatron_moe.convert.hf_writer import FolderWriter, new_folder, write_json
from megatron_moe.convert.registry import AUTO, family_for
from megatron_moe.convert.tensors import LIBRARY_WORDS, PROJECT_DTYPES, TensorSource
from megatron_moe.convert.tokenizer import TokenizerExport, read_tokenizer
from megatron_moe.parallel.state import ParallelState

NAMESPACE = "megatron_moe"  # of what config.json tells beyond the library's keys

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a person can choose. dtype: fp32 or bf16, None = as trained (fp32 for fp64)."""

    model_type: str = AUTO
    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    tokenizer_model: str | None = None  # where the tokenizer is now, if not where it was in training
    with_tokenizer: bool = True


def export_checkpoint(
    load: Path, output: Path, *, step: int | None = None, options: ExportOptions | None = None
) -> Family:
    """Write the checkpoint of `step` (None = the newest valid one) in `load` as the new folder `output`.

    Raises ConfigError if no family can express the model or `output` exists, CheckpointError if tensors and
    configuration do not belong together, StorageError if the disk fails; nothing of `output` is left then.
    """
    reader = find_checkpoint(load, step, ParallelState.alone().world)
    run = RunConfig.from_json(reader.config_json, source=f"{reader.folder}/config.json")
    source = CheckpointSource(reader)
    return export_model(source, run, output, options=options or ExportOptions(), where=str(reader.folder))


def export_model(source: TensorSource, run: RunConfig, output: Path, *, options: ExportOptions, where: str) -> Family:
    """The same for any source of the tensors of a run's model; `where` names it in errors."""
    tokenizer = _tokenizer(run, options)
    shape = model_shape(run, tokenizer)
    family = family_for(shape, options.model_type)
    dtype = _dtype(run, options.dtype)
    _tell_notes(shape, source, dtype)
    mapping = family.mapping(shape)
    max_length = run.model.max_position_embeddings or run.data.seq_length
    with new_folder(output) as folder:
        writer = FolderWriter(folder, mapping.their_shapes, dtype=dtype, max_shard_bytes=options.max_shard_bytes)
        try:
            mapping.to_theirs(source, writer, dtype=dtype, where=where)
            writer.close()
        finally:
            writer.abandon()
        ids = {f"{role}_id": tokenizer.id_of(role) for role in ("bos_token", "eos_token", "pad_token")}
        word = LIBRARY_WORDS[dtype]
        # transformers up to 4.55 reads torch_dtype
        extra = {"max_position_embeddings": max_length, "dtype": word, "torch_dtype": word}
        write_json(folder / "config.json", config_json(family, shape) | ids | extra)
        told = {name: number for name, number in ids.items() if number is not None}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **told})
        tokenizer.write(folder, max_length=max_length)
    log.info("wrote %s as %s, %s", output, family.model_type, LIBRARY_WORDS[dtype])
    return family


def config_json(family: Family, shape: ModelShape) -> dict[str, Any]:
    """What config.json says of the model; how it was trained goes into one table of the project's own."""
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.config_keys(shape),
        NAMESPACE: {"moe": dataclasses.asdict(shape.moe)},
    }


def model_shape(run: RunConfig, tokenizer: TokenizerExport) -> ModelShape:
    """The model with the vocabulary that was really used: --vocab-size, or the tokenizer's."""
    vocab_size = run.model.vocab_size or tokenizer.vocab_size
    if vocab_size is None:
        raise ConfigError(
            f"the checkpoint's config.json leaves --vocab-size to its {run.data.tokenizer_type}, which has to be read; "
            f"leave --no-tokenizer out, and give --tokenizer-model if the file has moved."
        )
    return ModelShape(model=run.model, moe=run.moe, vocab_size=vocab_size)


def _tokenizer(run: RunConfig, options: ExportOptions) -> TokenizerExport:
    if not options.with_tokenizer:
        return TokenizerExport(vocab_size=None)
    data = run.data
    if options.tokenizer_model is not None:
        data = replace(data, tokenizer_model=options.tokenizer_model)
    return read_tokenizer(data)


def _dtype(run: RunConfig, wanted: str | None) -> torch.dtype:
    word = wanted or ("bf16" if run.precision.dtype == "bf16" else "fp32")
    if word not in PROJECT_DTYPES:
        raise ConfigError(f"--dtype {word}: expected one of {', '.join(PROJECT_DTYPES)}.")
    return PROJECT_DTYPES[word]


def _tell_notes(shape: ModelShape, source: TensorSource, dtype: torch.dtype) -> None:
    """What changes on the way, and is no error."""
    narrowed = [name for name in source.names() if torch.promote_types(source.dtype(name), dtype) != dtype]
    if narrowed:
        log.warning("%d tensors are rounded to %s, first %s", len(narrowed), LIBRARY_WORDS[dtype], narrowed[0])
    factors = (shape.moe.expert_capacity_factor, shape.moe.eval_capacity_factor)
    if any(factors):
        log.warning(
            "the model was trained with a capacity (factor %s, evaluation %s); the library never drops a token, so "
            "logits differ where the project's evaluation would",
            *factors,
        )
