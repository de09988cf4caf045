"""Writes tests/golden/checkpoints/FORMAT: what today's code saves of a tiny run, and what loading it must give.

    PYTHONPATH=.:tests python tests/golden/write_checkpoints.py FORMAT

Written once, for a format, and never again: later code must load them all (tests/checkpoint/test_golden.py). To add
those of another format, give another FORMAT.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.trainer import FINISHED, Trainer
from tests.checkpoint.golden import losses, questions
from tests.end_to_end.tiny_job import CPU, write_corpus

FOLDER = Path(__file__).parent / "checkpoints"
TINY = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "ffn_hidden_size": 8,
    "make_vocab_size_divisible_by": 1,
}
# a bias for each expert is learnt beside the weights
SPARSE = {"num_experts": 4, "router_topk": 2, "layer_freq": "1", "ffn_hidden_size": 4, "router_type": "deepseek_v3"}
SPANS = {"objective": "span_corruption", "noise_density": 0.3, "vocab_extra_ids": 4}
TWO_STACKS = {"encoder_num_layers": 1, "position_embedding_type": "relative"}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {"model": {**TINY, "vocab_size": 12}, "precision": {"dtype": "bf16"}},
    "moe": {"model": {**TINY, "vocab_size": 12}, "moe": SPARSE},
    "encoder_decoder": {"model": {**TINY, **TWO_STACKS, "vocab_size": 16}, "data": SPANS},
}


def run_of(name: str) -> RunConfig:
    """Six steps of a run that stops after three, on the corpus of the current folder: no path of it is kept."""
    found: dict[str, dict[str, Any]] = {
        "training": {"global_batch_size": 4, "train_iters": 6, "exit_interval": 3},
        "optimizer": {"lr": 0.01},
        "checkpoint": {"save": "saved", "async_save": False},
        **RUNS[name],
    }
    data = {"seq_length": 8, "data_path": ["tokens"], "split": "90,10,0"}
    return RunConfig.from_dict({**found, "data": {**data, **found.get("data", {})}})


def write(name: str, place: Path) -> None:
    write_corpus(Path("tokens"), top=12)
    config = run_of(name)
    assert Trainer(config, ParallelState.alone(), CPU).run() == FINISHED
    shutil.copytree("saved", place, symlinks=True)
    (place / "latest").unlink()
    question = questions(config)
    (place / "expected.json").write_text(json.dumps({**question, **losses(place, question)}, indent=1) + "\n")


def main() -> None:
    folder = FOLDER / sys.argv[1]
    folder.mkdir(parents=True)
    for name in RUNS:
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            write(name, folder / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
