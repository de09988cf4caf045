"""The tiny model that is certified, and its samples: each a pure function of its number; some are padded or packed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch, Inputs, Stream

VOCAB, LENGTH, GLOBAL_BATCH, STEPS = 61, 8, 4, 3
ENCODER_LENGTH = 16  # another than the decoder's, so that none is taken for the other


def tiny_config(
    moe: Mapping[str, Any],
    parallel: Mapping[str, Any],
    model: Mapping[str, Any],
    micro_batch_size: int = 1,
    dtype: str = "fp64",
    encoder_moe: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Four layers, every second one sparse with four experts; {"num_experts": 0} makes all of them dense.

    With encoder_num_layers in `model` an encoder-decoder model; encoder_moe: the same of its encoder, none = dense.
    """
    sparse = {"num_experts": 4, "layer_freq": "2", "ffn_hidden_size": 12}
    stacks = {"moe": {**sparse, **moe}, "encoder_moe": {**sparse, **(encoder_moe or {"num_experts": 0})}}
    return RunConfig.from_dict(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 16,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 24,
                "vocab_size": VOCAB,
                "make_vocab_size_divisible_by": 8,
                **model,
            },
            **{name: fields if fields["num_experts"] else {} for name, fields in stacks.items()},
            "parallel": parallel,
            "precision": {"dtype": dtype},
            "data": {"seq_length": LENGTH},
            "training": {"global_batch_size": GLOBAL_BATCH, "train_iters": STEPS, "micro_batch_size": micro_batch_size},
            "optimizer": {"lr": 0.01, "clip_grad": 0.5},
        }
    )


def samples(numbers: Sequence[int]) -> Batch:
    """The samples with these numbers: one in three ends in padding, one in three holds two documents.

    No token comes twice in a sample: two that repeat at a document's start have equal scores in exact arithmetic, and
    which of them an expert prefers would be a matter of rounding.
    """
    tokens = torch.tensor(
        np.stack([np.random.default_rng(1000 + number).permutation(VOCAB)[: LENGTH + 1] for number in numbers])
    )
    segments = torch.zeros(len(numbers), LENGTH, dtype=torch.int32)
    mask = torch.ones(len(numbers), LENGTH)
    for row, number in enumerate(numbers):
        if number % 3 == 0:
            segments[row, 5:], mask[row, 5:] = -1, 0.0
        if number % 3 == 1:
            segments[row, 3:] = 1
    stream = Stream(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=mask,
        position_ids=torch.arange(LENGTH).repeat(len(numbers), 1),
        segments=segments,
    )
    return Batch({"decoder": stream}, torch.tensor(list(numbers)))


def pairs(numbers: Sequence[int]) -> Batch:
    """The same for an encoder-decoder model: each document of the decoder has one in the encoder."""
    decoder = samples(numbers).decoder
    tokens = torch.tensor(
        np.stack([np.random.default_rng(2000 + number).permutation(VOCAB)[:ENCODER_LENGTH] for number in numbers])
    )
    segments = torch.zeros(len(numbers), ENCODER_LENGTH, dtype=torch.int32)
    for row, number in enumerate(numbers):
        if number % 3 == 0:
            segments[row, 9:] = -1
        if number % 3 == 1:
            segments[row, 7:] = 1
    encoder = Inputs(
        tokens=tokens, position_ids=torch.arange(ENCODER_LENGTH).repeat(len(numbers), 1), segments=segments
    )
    return Batch({"encoder": encoder, "decoder": decoder}, torch.tensor(list(numbers)))
