"""A checkpoint that earlier code saved: fill a model from it, take its loss, and train one step further."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.load import CheckpointReader
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch, Inputs, Stream
from megatron_moe.models.load import vocab_size_of
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine
from tests.checkpoint.samples import newest

CPU = torch.device("cpu")
SAMPLES, LENGTH, TOP = 2, 8, 12


def questions(config: RunConfig) -> dict[str, list[list[int]]]:
    """Tokens for a model of this configuration, by stream."""
    random = torch.Generator().manual_seed(4)
    names = ["decoder", "encoder"] if config.model.encoder_num_layers else ["decoder"]
    return {name: torch.randint(0, TOP, (SAMPLES, LENGTH + 1), generator=random).tolist() for name in names}


def batch_of(question: dict[str, Any]) -> Batch:
    tokens = torch.tensor(question["decoder"])
    streams: dict[str, Inputs] = {
        "decoder": Stream(**plain(tokens[:, :-1]), labels=tokens[:, 1:], loss_mask=torch.ones(SAMPLES, LENGTH))
    }
    if "encoder" in question:
        streams["encoder"] = Inputs(**plain(torch.tensor(question["encoder"])))
    return Batch(streams, torch.arange(SAMPLES))


def plain(tokens: Tensor) -> dict[str, Tensor]:
    """One document from the first token to the last."""
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    return {"tokens": tokens, "position_ids": places, "segments": torch.zeros(tokens.shape, dtype=torch.int32)}


def engine_of(reader: CheckpointReader, precise: bool) -> Engine:
    """A model as the checkpoint's own configuration says, with its weights; precise: in float64."""
    config = RunConfig.from_json(reader.config_json, source=str(reader.folder))
    if precise:
        config = replace(config, precision=replace(config.precision, dtype="fp64"))
    engine = Engine(config, ParallelState.alone(), CPU, vocab_size_of(config, reader.state))
    engine.fill_weights(lambda blocks: assert_nothing_left(reader.fill_all(blocks, cast=precise)))
    return engine


def assert_nothing_left(names: list[str]) -> None:
    assert names == []


def losses(root: Path, question: dict[str, Any]) -> dict[str, float]:
    """The loss in float64 as saved, and, in the precision of the run, before and after one more step."""
    reader, batch = newest(root, strict=True), batch_of(question)
    exact, _ = engine_of(reader, precise=True).evaluate([batch])
    engine = engine_of(reader, precise=False)
    reader.fill_all(engine.optimizer.blocks(), "optim")
    engine.optimizer.load_state_dict(reader.state["optimizer"])
    trained = engine.train_step(reader.step, [batch])
    after, _ = engine.evaluate([batch])
    return {"loss": exact.loss, "trained": trained.metrics.loss, "grad_norm": trained.grad_norm, "after": after.loss}
