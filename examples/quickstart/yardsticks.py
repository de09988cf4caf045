"""What simple models make of the validation text, beside the trained model's loss."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_moe.config.run import RunConfig
from megatron_moe.data.build import build_datasets
from megatron_moe.data.gpt_dataset import Dataset
from megatron_moe.data.tokenizer import build_tokenizer
from megatron_moe.report.baselines import bigram_cross_entropy, bits_per_byte, gzip_bits_per_byte, unigram_cross_entropy


@dataclass(frozen=True)
class Yardsticks:
    """Nats per token and bits per byte of each model on the same validation tokens."""

    num_tokens: int
    num_bytes: int
    nats: dict[str, float]
    bits: dict[str, float]


def _tokens(dataset: Dataset, num_samples: int) -> np.ndarray:
    """The label tokens of the first samples, in order."""
    return np.concatenate([dataset.sample(number).labels for number in range(num_samples)])


def measure(config: RunConfig, model_loss: float) -> Yardsticks:
    """Unigram, bigram and gzip on exactly the tokens that the validation loss was taken over.

    The counts come from every token of the training split.
    """
    tokenizer = build_tokenizer(config.data, config.model.vocab_size)
    datasets = build_datasets(config, tokenizer)
    train, valid = datasets["train"], datasets["valid"]
    if train is None or valid is None:
        raise ValueError("the corpus is too small for a training and a validation split")
    tokens = _tokens(valid, config.training.eval_iters * config.training.global_batch_size)
    training = _tokens(train, train.num_samples)
    text = tokenizer.decode(tokens.tolist()).encode()
    nats = {
        "this model": model_loss,
        "bigram": bigram_cross_entropy(training, tokens, tokenizer.vocab_size),
        "unigram": unigram_cross_entropy(training, tokens, tokenizer.vocab_size),
    }
    bits = {name: bits_per_byte(value, len(tokens), len(text)) for name, value in nats.items()}
    return Yardsticks(len(tokens), len(text), nats, {**bits, "gzip -9": gzip_bits_per_byte(text)})


def validation_loss(folder: Path) -> float:
    """The last validation loss in a run's log. Raises ValueError when there is none."""
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    found = [line["validation_loss"] for line in lines if "validation_loss" in line]
    if not found:
        raise ValueError(f"{folder}: the log holds no validation loss")
    return float(found[-1])
