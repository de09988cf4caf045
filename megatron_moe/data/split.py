"""Which part of a corpus is for training, validation and test: Megatron's --split."""

from __future__ import annotations

from collections.abc import Sequence

SPLITS = ("train", "valid", "test")


def split_ranges(shares: Sequence[float], num_sequences: int) -> dict[str, range]:
    """The sequences of each split, in corpus order; empty where the share is 0. `shares` add up to 1.

    Bounds are rounded as Megatron does: int(round(sum of shares so far x sequences)), halves to even. A sequence is a
    document unless the corpus was written with several sequences in a document.
    [core/datasets/blended_megatron_dataset_builder.py, GPTDataset.numel_low_level_dataset]
    """
    bounds = [0.0]
    for share in shares:
        bounds.append(bounds[-1] + share)
    cuts = [int(round(bound * float(num_sequences))) for bound in bounds]
    return {name: range(cuts[number], cuts[number + 1]) for number, name in enumerate(SPLITS)}
