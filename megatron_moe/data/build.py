"""The datasets of a run, from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.gpt_dataset import BlendedDataset, Dataset, GPTDataset, SampleOptions, TokenStream, num_windows
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.split import SPLITS, split_ranges
from megatron_moe.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def build_datasets(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Dataset | None]:
    """ "train", "valid" and "test": None where --split gives nothing, or where valid or test has no whole sample.

    Raises ConfigError if options contradict the tokenizer, DataError if a corpus is missing, broken or too short.
    """
    options = sample_options(config, tokenizer)
    if not config.data.prefixes:
        raise ConfigError(
            "--data-path is empty; give the prefix of a .bin/.idx pair that tools/preprocess_data.py wrote."
        )
    corpora = [IndexedDataset(prefix) for prefix in config.data.prefixes]
    ranges = [split_ranges(config.data.split_fractions, corpus.num_sequences) for corpus in corpora]
    build = partial(_build_split, options=options, weights=config.data.weights, seed=config.training.seed)
    return {
        split: build(split, [TokenStream(corpus, part[split]) for corpus, part in zip(corpora, ranges, strict=True)])
        for split in SPLITS
    }


def sample_options(config: RunConfig, tokenizer: Tokenizer) -> SampleOptions:
    """What the run wants of a sample, checked against its tokenizer."""
    data, vocab_size = config.data, config.model.vocab_size
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"--vocab-size {vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "leave it out, or raise it to at least that."
        )
    if data.eod_mask_loss and tokenizer.eod_id is None:
        raise ConfigError("--eod-mask-loss needs a tokenizer with an end-of-document token; this one has none.")
    return SampleOptions(
        seq_length=data.seq_length,
        vocab_size=vocab_size or tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
    )


def _build_split(
    split: str, streams: Sequence[TokenStream], *, options: SampleOptions, weights: Sequence[float] | None, seed: int
) -> Dataset | None:
    if split == "train" and any(stream.num_tokens for stream in streams):
        # GPTDataset refuses a corpus too short to train on
        kept = list(range(len(streams)))
    else:
        kept = [number for number, stream in enumerate(streams) if num_windows(stream, options.seq_length)]
    for number in {number for number, stream in enumerate(streams) if stream.num_tokens}.difference(kept):
        logger.warning(
            "%s: the %s split has %d tokens, fewer than one sample, and is left out",
            streams[number].corpus.prefix, split, streams[number].num_tokens,
        )  # fmt: skip
    if not kept:
        return None
    if weights is None:
        return GPTDataset([streams[number] for number in kept], options, seed=seed, name=split)
    parts = [GPTDataset([streams[number]], options, seed=seed, name=f"{split}/{number}") for number in kept]
    return BlendedDataset(parts, [weights[number] for number in kept])
