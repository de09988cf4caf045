"""The corpus, how it is cut, and the tokenizer that made it."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.options import REQUIRED, check_values, option
from megatron_moe.config.span_lengths import corrupted_lengths, raw_length

TOKENIZERS = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer", "NullTokenizer", "ByteTokenizer")
TOKENIZERS_WITH_MODEL = ("SentencePieceTokenizer", "HuggingFaceTokenizer")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, how it is cut into samples, and its tokenizer."""

    flag_prefix: ClassVar[str] = ""

    data_path: tuple[str, ...] = option(
        (), "prefixes of .bin/.idx pairs, or a blend: weight prefix weight prefix ... (weights need not add up to 1)"
    )
    split: str = option("969,30,1", "shares of the documents for training, validation and test")
    seq_length: int = option(REQUIRED, "tokens in a sample; of the encoder, where there is one", at_least=1)
    objective: str = option(
        "causal",
        "what is learnt: causal = each next token; prefix_lm = the same after a prefix that all of the text sees; "
        "span_corruption = what was cut out (T5; needs an encoder)",
        choices=("causal", "prefix_lm", "span_corruption"),
    )
    noise_density: float = option(
        0.15, "span_corruption: share of tokens that are cut out; 0.15 in T5", above=0, below=1
    )
    mean_noise_span_length: float = option(
        3.0, "span_corruption: tokens of a span that is cut out, on average; 3 in T5", at_least=1
    )
    vocab_extra_ids: int = option(
        100, "span_corruption: ids after the tokenizer's that stand for what was cut out; 100 in T5", at_least=1
    )
    tokenizer_type: str = option(
        "NullTokenizer", "how text became ids; NullTokenizer: ids only, needs --vocab-size", choices=TOKENIZERS
    )
    tokenizer_model: str | None = option(
        None, "the SentencePiece model file; the tokenizer.json of Hugging Face, or its directory"
    )
    vocab_file: str | None = option(None, "vocab.json of GPT2BPETokenizer")
    merge_file: str | None = option(None, "merges.txt of GPT2BPETokenizer")
    verify_data: str = option(
        "lazy",
        "hashes of a corpus (<prefix>.hashes.json, where there are some): lazy = the index is compared at the start, "
        "the tokens block by block when they are first read; off = nothing is",
        choices=("lazy", "off"),
    )
    num_workers: int = option(0, "background threads that read samples ahead; 0 = none", at_least=0)
    eod_mask_loss: bool = option(False, "no loss on the token that ends a document")
    reset_position_ids: bool = option(False, "count positions from 0 again after each document's end")
    reset_attention_mask: bool = option(False, "attention stays within a document")

    def __post_init__(self) -> None:
        check_values(self)
        self._check_tokenizer()
        _ = self.split_fractions, self.weights

    @property
    def decoder_length(self) -> int:
        """Tokens that the decoder reads in a sample."""
        if self.objective != "span_corruption":
            return self.seq_length
        shares = (self.noise_density, self.mean_noise_span_length)
        return corrupted_lengths(raw_length(self.seq_length, *shares), *shares)[1]

    @property
    def tokens_of_a_sample(self) -> int:
        """Those that pass the model, in encoder and decoder."""
        return self.decoder_length + (self.seq_length if self.objective == "span_corruption" else 0)

    @property
    def split_fractions(self) -> tuple[float, float, float]:
        """Shares of training, validation and test; they add up to 1."""
        words = self.split.split(",")
        shares = [_number(word) for word in words]
        total = sum(share for share in shares if share is not None)
        if not 1 <= len(shares) <= 3 or any(share is None or share < 0 for share in shares) or total <= 0:
            raise ConfigError(
                f'--split "{self.split}": expected up to three shares, none negative, not all 0, such as 969,30,1.'
            )
        train, valid, test = ([(share or 0.0) / total for share in shares] + [0.0, 0.0])[:3]
        return train, valid, test

    @property
    def weights(self) -> tuple[float, ...] | None:
        """One weight for each of `prefixes`, as given; None when none was given."""
        numbers = [_number(word) for word in self.data_path]
        if all(number is None for number in numbers):
            return None
        weights, others = numbers[::2], numbers[1::2]
        right = len(weights) == len(others) and all(number is None for number in others)
        positive = tuple(weight for weight in weights if weight is not None and weight > 0)
        if not right or len(positive) != len(weights):
            raise ConfigError(
                f"--data-path {' '.join(self.data_path)}: expected a positive weight before each prefix, or prefixes "
                f"only; a prefix that looks like a number is written ./3."
            )
        return positive

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of the .bin/.idx pairs, without weights."""
        return self.data_path if self.weights is None else self.data_path[1::2]

    def _check_tokenizer(self) -> None:
        kind = self.tokenizer_type
        files = {
            "--tokenizer-model": (self.tokenizer_model, kind in TOKENIZERS_WITH_MODEL),
            "--vocab-file": (self.vocab_file, kind == "GPT2BPETokenizer"),
            "--merge-file": (self.merge_file, kind == "GPT2BPETokenizer"),
        }
        for flag, (given, needed) in files.items():
            owners = " or ".join(TOKENIZERS_WITH_MODEL) if flag == "--tokenizer-model" else "GPT2BPETokenizer"
            if needed and given is None:
                raise ConfigError(f"--tokenizer-type {kind} needs {flag}; give the path.")
            if given is not None and not needed:
                raise ConfigError(
                    f"{flag} {given} has no effect with --tokenizer-type {kind}; "
                    f"leave it out, or use --tokenizer-type {owners}."
                )


def _number(word: str) -> float | None:
    """A finite number, or None for any other word."""
    try:
        number = float(word)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None
