"""Runs that learn spans or what follows a prefix: whole, stopped and resumed, and in other microbatches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch, Stream
from megatron_moe.data.indexed_writer import IndexedDatasetWriter
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.trainer import FINISHED, Trainer
from tests.end_to_end.tiny_job import CPU, VOCAB, job, state_hash

OBJECTIVES: dict[str, dict[str, Any]] = {
    "prefix_lm": {"data": {"objective": "prefix_lm", "seq_length": 24, "reset_attention_mask": True}},
    "span_corruption": {
        "model": {"encoder_num_layers": 2, "vocab_size": VOCAB + 20, "position_embedding_type": "relative"},
        "data": {"objective": "span_corruption", "seq_length": 24, "noise_density": 0.3, "vocab_extra_ids": 20},
    },
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that count up from a random number, so that there is something to learn."""
    prefix, random = tmp_path_factory.mktemp("corpus") / "tokens", np.random.default_rng(3)
    with IndexedDatasetWriter(prefix, dtype=np.dtype(np.uint16)) as writer:
        for _ in range(200):
            start, length = int(random.integers(0, VOCAB)), int(random.integers(5, 31))
            writer.add_document([*((start + place) % (VOCAB - 1) for place in range(length)), VOCAB - 1])
        writer.finish()
    return prefix


def run(corpus: Path, objective: str, **changes: dict[str, Any]) -> Trainer:
    base = {"data": {}, "training": {"train_iters": 8}, **OBJECTIVES[objective]}
    merged = {name: {**base.get(name, {}), **changes.get(name, {})} for name in base.keys() | changes.keys()}
    config: RunConfig = job(corpus, **merged)
    trainer = Trainer(config, ParallelState.alone(), CPU)
    assert trainer.run() == FINISHED
    return trainer


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_equals_a_whole_one_bit_by_bit(corpus: Path, tmp_path: Path, objective: str) -> None:
    whole = run(corpus, objective)
    folder = {"save": str(tmp_path), "load": "latest"}
    first = run(corpus, objective, training={"train_iters": 8, "exit_interval": 3}, checkpoint=folder)
    assert first.step == 3
    second = run(corpus, objective, training={"train_iters": 8}, checkpoint=folder)
    assert (second.first_step, second.step) == (3, 8)
    assert state_hash(second) == state_hash(whole) != state_hash(first)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_falls_and_does_not_depend_on_the_microbatches(corpus: Path, objective: str) -> None:
    precise = {"precision": {"dtype": "fp64"}, "logging": {"log_interval": 100}}
    losses = []
    for micro in (1, 2, 4):
        training = {"train_iters": 40, "micro_batch_size": micro, "exit_interval": 1}
        trainer = run(corpus, objective, training=training, optimizer={"lr": 0.03}, **precise)
        losses.append([trainer.train_step().metrics.loss for _ in range(30)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and losses[2] == pytest.approx(losses[0], rel=1e-9)
    assert sum(losses[0][-5:]) < sum(losses[0][:5]) - 0.5


def test_the_model_looks_at_all_of_the_prefix(corpus: Path) -> None:
    trainer = run(corpus, "prefix_lm")
    batch = trainer.loader.dataset.get([0])
    decoder = batch.decoder
    assert decoder.prefix is not None and decoder.prefix.sum() > 1

    def loss(stream: Stream) -> float:
        return trainer.engine.evaluate([Batch({"decoder": stream}, batch.sample_ids)])[0].loss

    assert abs(loss(decoder) - loss(replace(decoder, prefix=None))) > 1e-4
