"""Batches: what `rows` and `to` keep."""

import torch

from megatron_moe.data.batch import Batch, Stream


def make_batch(size: int, length: int) -> Batch:
    tokens = torch.arange(size * length).reshape(size, length)
    stream = Stream(
        tokens=tokens,
        labels=tokens + 1,
        loss_mask=torch.ones(size, length),
        position_ids=torch.arange(length).expand(size, length),
        segments=torch.zeros(size, length, dtype=torch.int32),
    )
    return Batch(streams={"decoder": stream}, sample_ids=torch.arange(100, 100 + size))


def test_rows_cuts_every_tensor_alike() -> None:
    batch = make_batch(4, 3).rows(1, 3)
    assert batch.sample_ids.tolist() == [101, 102]
    assert batch.decoder.tokens.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert batch.decoder.labels.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert {tuple(tensor.shape) for tensor in vars(batch.decoder).values()} == {(2, 3)}


def test_to_moves_every_tensor() -> None:
    batch = make_batch(2, 3).to("meta")
    assert batch.sample_ids.is_meta and all(tensor.is_meta for tensor in vars(batch.decoder).values())
