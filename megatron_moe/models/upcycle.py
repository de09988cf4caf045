"""A dense model as a sparse one: each dense feed-forward layer is copied into every expert of its layer.

[Komatsuzaki et al., arXiv:2212.05055, section 3.] Routers begin as in a new model. The weights of the chosen experts
sum to 1 (top_k, softmax after the choice, nothing dropped), so the function is that of the dense model at first.
"""

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.load import CheckpointReader
from megatron_moe.checkpoint.manifest import Manifest
from megatron_moe.checkpoint.names import folded
from megatron_moe.checkpoint.reshard import Rectangle
from megatron_moe.checkpoint.rewrite import runs_of
from megatron_moe.checkpoint.stream import Piece, streamed_checkpoint
from megatron_moe.checkpoint.tensor_file import DTYPE_NAMES, Bytes, bytes_of
from megatron_moe.checkpoint.write import RankTable
from megatron_moe.config.errors import CheckpointError, ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.models.build import build_stages, gpt_spec
from megatron_moe.models.load import vocab_size_of
from megatron_moe.moe.routers.router import Router
from megatron_moe.parallel.blocks import Block, module_blocks
from megatron_moe.parallel.layout import materialise
from megatron_moe.parallel.state import ParallelState

_EXPERT = re.compile(r"\.experts\.[0-9]+\.")


def upcycle(reader: CheckpointReader, root: Path, moe: Mapping[str, Any]) -> Manifest:
    """Write the reader's dense model as step 0 of the directory `root`, weights only; little is in memory at a time.

    moe: num_experts, router_topk, layer_freq.  Raises ConfigError if the model is sparse already or the options make no
    model, CheckpointError listing every tensor that does not fit, StorageError.
    """
    run = _sparse_run(reader, moe)
    blocks = _blocks_of(run, vocab_size_of(run, reader.state))
    _check(reader, blocks)
    pieces = [
        Piece(block.name, DTYPE_NAMES[block.tensor.dtype], block.shape, Rectangle.whole(block.shape))
        for block in sorted(blocks, key=lambda block: -block.tensor.element_size())
    ]
    fresh = {block.name: block.tensor for block in blocks if not block.tensor.is_meta}
    run_id = f"upcycle-{uuid.uuid4().hex[:12]}"
    need = sum(piece.num_bytes for piece in pieces)
    with streamed_checkpoint(root, 0, run_id, mark=f"{run_id}-1", need=need, flag="DST") as made:
        file = made.file("model", 0, pieces)
        for piece in pieces:
            source = fresh.get(piece.name)
            file.write(piece, _all_of(source) if source is not None else runs_of(reader, _dense(piece.name), piece))
        table = RankTable()
        file.finish(table)
        state = {"step": 0, "upcycled_from": str(reader.folder), "vocab_size": vocab_size_of(run, reader.state)}
        texts = {"state.json": json.dumps(state), "config.json": run.to_json(), "data.json": reader.texts["data.json"]}
        return made.finish([table], texts)


def _sparse_run(reader: CheckpointReader, moe: Mapping[str, Any]) -> RunConfig:
    dense = RunConfig.from_json(reader.config_json, source=f"config.json of {reader.folder}")
    if any(stack.num_experts for stack, _ in dense.stacks):
        raise ConfigError(
            f"{reader.folder} holds a sparse model already, with --num-experts {dense.moe.num_experts}; "
            f"the number of experts is not changed. Name a checkpoint of a dense model."
        )
    if moe["num_experts"] < 2:
        raise ConfigError(f"--num-experts {moe['num_experts']} makes no sparse model; give 2 or more.")
    tables = {
        section: {name: value for name, value in table.items() if dense.origin(f"{section}.{name}") != "default"}
        for section, table in dense.to_dict().items()
    }
    return RunConfig.from_dict({**tables, "moe": dict(moe)}, origin="checkpoint")


def _blocks_of(run: RunConfig, vocab_size: int) -> list[Block]:
    """All of the sparse model, whole; on meta but for the routers, which are as in a new model."""
    state = ParallelState.alone()
    stages = build_stages(gpt_spec(run, vocab_size), state)
    for stage in stages:
        for name, module in stage.named_modules():
            if isinstance(module, Router):
                materialise(module, state, run.training.seed, torch.device("cpu"), prefix=f"{name}.")
    return module_blocks(stages, state)


def _dense(name: str) -> str:
    """layers.3.mlp.experts.5.w1 is a copy of layers.3.mlp.w1."""
    return _EXPERT.sub(".", name)


def _check(reader: CheckpointReader, blocks: list[Block]) -> None:
    stored = reader.tensors["model"]
    copied = [block for block in blocks if block.tensor.is_meta]
    sources = {_dense(block.name) for block in copied}
    problems = [f"{name} is not there" for name in folded(sources - set(stored))]
    for block in copied:
        name, dtype = _dense(block.name), DTYPE_NAMES[block.tensor.dtype]
        tensor = stored.get(name)
        if tensor is not None and (tensor.dtype, tensor.shape) != (dtype, block.shape):
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, needed {dtype} {list(block.shape)}")
    spare = set(stored) - sources
    problems += [f"{name} has no place in the sparse model" for name in folded(spare)]
    if problems:
        raise CheckpointError(f"{reader.folder} does not fit:\n" + "\n".join(dict.fromkeys(problems)))


def _all_of(tensor: torch.Tensor) -> Iterator[Bytes]:
    yield bytes_of(tensor.contiguous())
