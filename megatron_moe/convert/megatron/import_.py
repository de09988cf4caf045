"""A Megatron checkpoint as a project checkpoint at step 0: weights only, with the configuration that they ask for."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

import torch

from megatron_moe.config.errors import CheckpointError, ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.convert.checkpoint_files import STEP, new_checkpoint
from megatron_moe.convert.import_ import run_config
from megatron_moe.convert.megatron.child import Opened, opened, require_permission
from megatron_moe.convert.megatron.folder import Iteration, find_iteration
from megatron_moe.convert.megatron.mapping import EMBEDDING, HEAD, megatron_mapping
from megatron_moe.convert.megatron.names import MegatronSource
from megatron_moe.convert.megatron.ranks import merged, rank_files
from megatron_moe.convert.megatron.settings import read_settings
from megatron_moe.convert.megatron.stored import PlainFiles, Stored, distributed

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MegatronOptions:
    """What a person can choose. iteration: None = the newest.  vocab_size: None = all rows, padding too."""

    iteration: int | None = None
    pickles_allowed: bool = False
    with_optimizer: bool = False
    vocab_size: int | None = None


def import_megatron(folder: Path, root: Path, options: MegatronOptions) -> RunConfig:
    """Write the checkpoint in `folder` as step 0 of the checkpoint directory `root`; returns its configuration.

    Raises ConfigError if pickles are not allowed, if the project cannot express the model, or `root` has a step 0;
    CheckpointError if tensors and settings do not belong together or a pickle is refused; NoCheckpointError if there is
    none; StorageError if the disk fails. Nothing is left then.
    """
    if options.with_optimizer:
        raise ConfigError(
            "--with-optimizer: only weights are read from Megatron's checkpoints, for its optimizer state lies in "
            "formats that depend on how it was run; leave the flag out and train on with --finetune."
        )
    iteration = find_iteration(folder, options.iteration)
    require_permission(iteration, options.pickles_allowed)
    scratch = root.parent if root.parent.is_dir() else Path(gettempdir())
    with opened(iteration, scratch) as plain:
        return _convert(iteration, plain, root, options)


def _convert(iteration: Iteration, plain: Opened, root: Path, options: MegatronOptions) -> RunConfig:
    where, files = str(iteration.folder), PlainFiles()
    log.info("%s: its pickles were opened by a child process; network: %s", where, plain.isolation)
    _tell_ignored(plain)
    _check_iterations(plain, where)
    arguments = plain.files[0].arguments
    gated = arguments.get("swiglu") is True
    if iteration.kind == "torch_dist":
        tensors = distributed(plain.files[0].tensors, plain.files[0].weights, files)
    else:
        tensors = merged(rank_files(plain.files, arguments), files, gated=gated)
    rows = _vocabulary_rows(tensors, where)
    shape = read_settings(arguments, rows=rows, vocab_size=options.vocab_size)
    source = MegatronSource(tensors, files, shape.model.num_layers)
    _drop_tied_copy(source, shape.model.untie_embeddings_and_output_weights, where)
    if options.vocab_size is None:
        log.info("all %d rows of the vocabulary are kept, padding too; --vocab-size would leave that out", rows)
    if shape.vocab_size < rows:
        log.info("rows %d to %d of the vocabulary are padding and are left out", shape.vocab_size, rows)
        for name in {EMBEDDING, HEAD} & set(source.names()):
            source.keep_rows(name, shape.vocab_size)
    mapping = megatron_mapping(shape)
    run = run_config(shape, iteration.folder, source.dtype(EMBEDDING))
    with new_checkpoint(root, mapping.checked_our_tensors(source, where=where)) as sink:
        mapping.to_ours(source, sink, where=where)
        sink.finish(run.to_json(), {"step": STEP, "imported_from": where}, {})
    log.info(
        "wrote step %d in %s, weights only; train on with --config %s --load %s --finetune",
        STEP,
        root,
        root / f"step_{STEP:08d}" / "config.json",
        root,
    )
    return run


def _vocabulary_rows(tensors: dict[str, Stored], where: str) -> int:
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise CheckpointError(f"{where} has no matrix {EMBEDDING}, so it is no GPT model of Megatron-Core.")
    return tensors[EMBEDDING].shape[0]


def _drop_tied_copy(source: MegatronSource, untied: bool, where: str) -> None:
    """A tied head that the last pipeline rank repeats; it has to be the same."""
    if untied or HEAD not in source.names():
        return
    if not torch.equal(source.read(EMBEDDING), source.read(HEAD)):
        raise CheckpointError(f"{where}: args tie the head to the embedding, but {HEAD} differs from {EMBEDDING}.")
    source.without(HEAD)


def _check_iterations(plain: Opened, where: str) -> None:
    found = {str(file.iteration): file.source for file in plain.files}
    if len(found) > 1:
        told = ", ".join(f"{source} of iteration {number}" for number, source in found.items())
        raise CheckpointError(f"{where} mixes files of several saves: {told}.")


def _tell_ignored(plain: Opened) -> None:
    counts = Counter(reason for file in plain.files for reason in file.ignored.values())
    for reason, count in counts.items():
        log.info("ignored: %d entries, %s", count, reason)
