"""Batches: what `rows` and `to` keep."""

import torch

from megatron_moe.data.batch import Batch, Inputs, Stream


def make_batch(size: int, length: int) -> Batch:
    tokens = torch.arange(size * length).reshape(size, length)
    stream = Stream(
        tokens=tokens,
        labels=tokens + 1,
        loss_mask=torch.ones(size, length),
        position_ids=torch.arange(length).expand(size, length),
        segments=torch.zeros(size, length, dtype=torch.int32),
        prefix=tokens < 2,
    )
    encoder = Inputs(tokens=tokens, position_ids=stream.position_ids, segments=stream.segments)
    return Batch(streams={"decoder": stream, "encoder": encoder}, sample_ids=torch.arange(100, 100 + size))


def test_rows_cuts_every_tensor_alike() -> None:
    batch = make_batch(4, 3).rows(1, 3)
    assert batch.sample_ids.tolist() == [101, 102]
    assert batch.decoder.tokens.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert batch.decoder.labels.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert batch.decoder.prefix is not None and batch.encoder is not None
    for stream in (batch.decoder, batch.encoder):
        assert {tuple(tensor.shape) for tensor in vars(stream).values()} == {(2, 3)}


def test_to_moves_every_tensor() -> None:
    batch = make_batch(2, 3).to("meta")
    assert batch.sample_ids.is_meta and all(tensor.is_meta for tensor in vars(batch.decoder).values())
    assert batch.encoder is not None and all(tensor.is_meta for tensor in vars(batch.encoder).values())


def test_a_stream_without_a_prefix_stays_without_one() -> None:
    stream = make_batch(2, 3).decoder
    plain = Stream(**{**vars(stream), "prefix": None})
    assert plain.map(lambda tensor: tensor[:1]).prefix is None
