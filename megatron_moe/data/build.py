"""The datasets of a run, from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.span_lengths import raw_length
from megatron_moe.data.gpt_dataset import BlendedDataset, Dataset, GPTDataset, SampleOptions, TokenStream, num_windows
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.objectives import PrefixOptions, SpanOptions
from megatron_moe.data.split import SPLITS, split_ranges
from megatron_moe.data.tokenizer import NullTokenizer, Tokenizer

logger = logging.getLogger(__name__)


def build_datasets(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Dataset | None]:
    """ "train", "valid" and "test": None where --split gives nothing, or where valid or test has no whole sample.

    Raises ConfigError if options or corpora contradict the tokenizer, DataError if a corpus is missing, broken or too
    short.
    """
    options = sample_options(config, tokenizer)
    if not config.data.prefixes:
        raise ConfigError(
            "--data-path is empty; give the prefix of a .bin/.idx pair that tools/preprocess_data.py wrote."
        )
    corpora = [
        IndexedDataset(prefix, use_hashes=config.data.verify_data == "lazy") for prefix in config.data.prefixes
    ]
    _check_tokenizer(corpora, tokenizer)
    ranges = [split_ranges(config.data.split_fractions, corpus.num_sequences) for corpus in corpora]
    build = partial(_build_split, options=options, weights=config.data.weights, seed=config.training.seed)
    return {
        split: build(split, [TokenStream(corpus, part[split]) for corpus, part in zip(corpora, ranges, strict=True)])
        for split in SPLITS
    }


def _check_tokenizer(corpora: Sequence[IndexedDataset], tokenizer: Tokenizer) -> None:
    """Ids must mean what they meant when they were made; a NullTokenizer leaves their meaning open."""
    if isinstance(tokenizer, NullTokenizer):
        return
    own = tokenizer.fingerprint()
    others = [corpus for corpus in corpora if corpus.tokenizer_fingerprint() not in (None, own)]
    if others:
        made = "; ".join(f"{corpus.prefix}: {corpus.tokenizer_fingerprint()}" for corpus in others)
        raise ConfigError(
            f"the tokenizer has the fingerprint {own}, but tokens of --data-path were made with another one ({made}); "
            "give the tokenizer that made them, or preprocess the text with this one."
        )


def vocabulary_size(config: RunConfig, tokenizer: Tokenizer) -> int:
    """Ids of the model: the tokenizer's, and after them the sentinels of span corruption.

    Raises ConfigError if --vocab-size has no room for them.
    """
    needed = tokenizer.vocab_size
    if config.data.objective == "span_corruption":
        needed = text_vocabulary(config, tokenizer) + config.data.vocab_extra_ids
    given = config.model.vocab_size
    if given is not None and given < needed:
        sentinels = "" if needed == tokenizer.vocab_size else " and --vocab-extra-ids together"
        raise ConfigError(
            f"--vocab-size {given} is smaller than the tokenizer's {needed}{sentinels}; "
            "leave it out, or raise it to at least that."
        )
    return given or needed


def text_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> int:
    """Ids of the text, after which the sentinels come: new ones, or those of the tokenizer (T5's tokenizer.json).

    Raises ConfigError if it has another number of them.
    """
    own, wanted = tokenizer.num_sentinels, config.data.vocab_extra_ids
    if own not in (0, wanted):
        raise ConfigError(
            f"--vocab-extra-ids {wanted}, but the tokenizer has {own} sentinels already, <extra_id_0> to "
            f"<extra_id_{own - 1}>; give --vocab-extra-ids {own}."
        )
    return tokenizer.text_size


def sample_options(config: RunConfig, tokenizer: Tokenizer) -> SampleOptions:
    """What the run wants of a sample, checked against its tokenizer."""
    data, vocab_size = config.data, vocabulary_size(config, tokenizer)
    if config.model.encoder_num_layers and data.objective != "span_corruption":
        raise ConfigError(
            f"--objective {data.objective} gives --encoder-num-layers {config.model.encoder_num_layers} nothing to "
            f"read; use --objective span_corruption, or leave the encoder out."
        )
    if data.objective == "span_corruption":
        return _span_options(config, tokenizer)
    if data.eod_mask_loss and tokenizer.eod_id is None:
        raise ConfigError("--eod-mask-loss needs a tokenizer with an end-of-document token; this one has none.")
    kind = PrefixOptions if data.objective == "prefix_lm" else SampleOptions
    return kind(
        seq_length=data.seq_length,
        vocab_size=vocab_size,
        eod_id=tokenizer.eod_id,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
    )


def _span_options(config: RunConfig, tokenizer: Tokenizer) -> SpanOptions:
    """The sentinels stand after the tokenizer's ids."""
    data = config.data
    if tokenizer.eod_id is None:
        raise ConfigError(
            "--objective span_corruption closes each sequence by the tokenizer's end-of-document token, and this one "
            "has none; use another tokenizer."
        )
    return SpanOptions(
        seq_length=data.seq_length,
        vocab_size=text_vocabulary(config, tokenizer),
        raw_length=raw_length(data.seq_length, data.noise_density, data.mean_noise_span_length),
        noise_density=data.noise_density,
        mean_span=data.mean_noise_span_length,
        num_sentinels=data.vocab_extra_ids,
        end_id=tokenizer.eod_id,
        start_id=start_id(tokenizer),
    )


def start_id(tokenizer: Tokenizer) -> int:
    """What a decoder behind an encoder reads first: padding, as in T5, or the end of a document where there is none.

    Raises ConfigError for a tokenizer that has neither.
    """
    found = tokenizer.eod_id if tokenizer.pad_id is None else tokenizer.pad_id
    if found is None:
        raise ConfigError("the decoder's first token is the tokenizer's padding or end; this one has neither.")
    return found


def _build_split(
    split: str, streams: Sequence[TokenStream], *, options: SampleOptions, weights: Sequence[float] | None, seed: int
) -> Dataset | None:
    if split == "train" and any(stream.num_tokens for stream in streams):
        # GPTDataset refuses a corpus too short to train on
        kept = list(range(len(streams)))
    else:
        kept = [number for number, stream in enumerate(streams) if num_windows(stream, options)]
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
