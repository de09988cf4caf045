"""A tiny job on a corpus of random tokens, watched step by step, in which faults strike anywhere.

Every rank writes down, for every step it finished, the samples it read and one hash of all that it would carry into
the next step. The notes are on the disk at once, so they survive SIGKILL.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.data.indexed_writer import IndexedDatasetWriter
from megatron_moe.data.loader import Loader
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine, StepResult, grid_of
from megatron_moe.training.trainer import Trainer
from tests.faults.inject import Faults, attach
from tests.faults.plan import FaultPlan

VOCAB, LENGTH, GLOBAL_BATCH = 61, 8, 4
CPU = torch.device("cpu")


def write_corpus(prefix: Path, *, seed: int = 5, documents: int = 60, top: int = VOCAB) -> Path:
    """Documents of 5 to 30 random tokens below `top`."""
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, dtype=np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            writer.add_document(random.integers(0, top, int(random.integers(5, 31))))
        writer.finish()
    return prefix


def tables(corpus: Path, **changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of a run of 12 steps, by section; `changes` are added to the sections that they name."""
    found: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 16,
            "vocab_size": VOCAB,
            "make_vocab_size_divisible_by": 8,
        },
        "moe": {
            "num_experts": 4,
            "layer_freq": "2",
            "ffn_hidden_size": 8,
            "z_loss_coeff": 0.001,
            "aux_loss_coeff": 0.01,
        },
        "data": {"seq_length": LENGTH, "data_path": [str(corpus)], "split": "90,10,0"},
        "training": {"global_batch_size": GLOBAL_BATCH, "train_iters": 12},
        "optimizer": {"lr": 0.01, "lr_warmup_iters": 3},
        "logging": {"log_interval": 1},
    }
    for section, values in changes.items():
        found[section] = {**found.get(section, {}), **values}
    return found


def job(corpus: Path, **changes: Mapping[str, Any]) -> RunConfig:
    return RunConfig.from_dict(tables(corpus, **changes))


@dataclass(frozen=True)
class Note:
    """What one rank writes down about one finished step."""

    attempt: int
    step: int
    samples: list[int]
    consumed: int
    loss: float
    state: str  # SHA-256
    at: float = 0.0  # seconds, on the clock of this machine


def attempt(
    rank: int,
    world_size: int,
    text: str,
    notes: str,
    number: int,
    plan: FaultPlan | None,
    inbox: Path | None = None,
    pace_s: float = 0.0,
) -> int:
    """One start of the job on one rank; returns its exit code, unless a fault ends it.

    inbox: see Faults.  pace_s: idle after each step.
    """
    config = RunConfig.from_json(text)
    state = ParallelState.alone() if world_size == 1 else ParallelState.distributed(grid_of(config, world_size))
    faults = Faults(plan or FaultPlan(), rank, inbox)
    faults.reach("startup.begin")
    trainer = Trainer(config, state, CPU)
    if plan is not None or inbox is not None:
        attach(trainer, faults)
    faults.reach("startup.built")
    with (Path(notes) / f"rank{rank}.jsonl").open("ab", buffering=0) as file:
        watch(trainer, file.write, number, pace_s)
        return trainer.run()


def watch(trainer: Trainer, write: Callable[[bytes], Any], number: int, pace_s: float = 0.0) -> None:
    """Let a trainer tell of every step of attempt `number`: one line of JSON, a Note."""
    train = trainer.engine.train_step

    def watched(step: int, batches: Sequence[Batch], last_checkpoint: str | None = None) -> StepResult:
        result = train(step, batches, last_checkpoint)
        samples = [int(sample) for batch in batches for sample in batch.sample_ids]
        consumed = trainer.loader.state_dict()["consumed_samples"]
        note = Note(number, step + 1, samples, consumed, result.metrics.loss, state_hash(trainer), time.monotonic())
        write(json.dumps(asdict(note)).encode() + b"\n")
        time.sleep(pace_s)
        return result

    trainer.engine.train_step = watched  # type: ignore[method-assign]


def state_hash(trainer: Trainer) -> str:
    return hash_of(trainer.engine, trainer.loader)


def hash_of(engine: Engine, loader: Loader) -> str:
    """Weights, optimizer, buffers of routers, counters: all of this rank that the next step depends on."""
    digest = hashlib.sha256()
    for block in [*engine.weight_blocks(), *engine.optimizer.blocks()]:
        digest.update(f"{block.name} {block.global_shape} {block.offset} {block.shape}".encode())
        digest.update(bytes_of(block.tensor))
    for module in engine.modules:
        for name, buffer in module.named_buffers():
            digest.update(name.encode() + bytes_of(buffer))
    counters = [engine.optimizer.state_dict(), loader.state_dict(), engine.config.training.seed]
    digest.update(json.dumps(counters).encode())
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Step:
    """One finished step of one attempt, over all ranks."""

    attempt: int
    step: int
    samples: list[int]  # of the global batch, in order
    consumed: int
    loss: float
    state: str  # SHA-256 over the ranks' hashes
    at: float = field(default=0.0, compare=False)  # seconds: when the last rank had done it


def read_steps(notes: Path, world_size: int) -> list[Step]:
    """The steps that every rank wrote down, in the order in which they were done."""
    ranks = []
    for rank in range(world_size):
        lines = (notes / f"rank{rank}.jsonl").read_text().rpartition("\n")[0].splitlines()
        found = [Note(**json.loads(line)) for line in lines]
        ranks.append({(note.attempt, note.step): note for note in found})
    steps = []
    for key in sorted(set.intersection(*(set(rank) for rank in ranks))):
        told = [rank[key] for rank in ranks]
        assert len({(note.consumed, note.loss) for note in told}) == 1, "all ranks know the same"
        samples = sorted({sample for note in told for sample in note.samples})
        state = hashlib.sha256("".join(note.state for note in told).encode()).hexdigest()
        steps.append(Step(*key, samples, told[0].consumed, told[0].loss, state, max(note.at for note in told)))
    return steps
