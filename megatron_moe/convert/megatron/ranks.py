"""Files of the format torch, one for each rank, put together: which rows of which rank are which of the whole.

tp splits columns and rows of products; pp splits layers, which each rank counts from 0; ep splits experts, likewise.
All other tensors are repeated on several ranks, where they have to be equal.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_moe.config.errors import CheckpointError
from megatron_moe.convert.megatron.child import OpenedFile
from megatron_moe.convert.megatron.folder import RANK_FOLDER
from megatron_moe.convert.megatron.stored import Piece, PlainFiles, Stored
from megatron_moe.convert.tensors import Shape

# which dimension tp splits; everything else is whole on each rank
COLUMNS = (
    r"embedding\.word_embeddings\.weight",
    r"output_layer\.weight",
    r".*\.self_attention\.linear_qkv\.(weight|bias)",
    r".*\.linear_fc1\.(weight|bias)",
)
ROWS = (r".*\.self_attention\.linear_proj\.weight", r".*\.linear_fc2\.weight")
GATED = r".*\.linear_fc1\.(weight|bias)"
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
LOCAL_EXPERT = re.compile(r"(.*\.mlp\.experts\.)local_experts\.(\d+)\.(.+)")
GROUPED_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(linear_fc[12]\.(?:weight|bias))(\d+)")


@dataclass(frozen=True)
class RankFile:
    """The file of a rank, by its place in the grid."""

    tp: int
    pp: int
    ep: int
    file: OpenedFile


def rank_files(files: Sequence[OpenedFile], arguments: Mapping[str, object]) -> list[RankFile]:
    """The files by rank; CheckpointError if the grid is not whole.

    mp_rank_TT_XXX means a pipeline or an expert rank: the sizes in the settings say which.
    """
    pipeline, experts = (_size(arguments, f"{kind}_model_parallel_size") for kind in ("pipeline", "expert"))
    tensor = _size(arguments, "tensor_model_parallel_size")
    found = []
    for file in files:
        match = RANK_FOLDER.fullmatch(file.source)
        if match is None:
            raise CheckpointError(f"{file.source} is no name of a rank's folder.")
        numbers = [int(word) for word in match.groups()[1:] if word is not None]
        pp = numbers.pop(0) if pipeline > 1 and numbers else 0
        ep = numbers.pop(0) if experts > 1 and numbers else 0
        if numbers:
            raise CheckpointError(f"{file.source} has more numbers than its sizes: PP {pipeline}, EP {experts}.")
        found.append(RankFile(int(match[1]), pp, ep, file))
    there = {(rank.tp, rank.pp, rank.ep) for rank in found}
    needed = {(tp, pp, ep) for tp in range(tensor) for pp in range(pipeline) for ep in range(experts)}
    if there != needed:
        told = ", ".join(map(str, sorted(needed - there)[:4])) or f"none, and {sorted(there - needed)[0]} is too many"
        raise CheckpointError(
            f"the files of the ranks are not one for each of TP {tensor} x PP {pipeline} x EP {experts}: missing "
            f"(tp, pp, ep) {told}; copy the whole folder. (Expert tensor parallelism other than TP is not read.)"
        )
    return sorted(found, key=lambda rank: (rank.pp, rank.ep, rank.tp))


def merged(ranks: Sequence[RankFile], files: PlainFiles, *, gated: bool) -> dict[str, Stored]:
    """All tensors under global numbers of layers and experts (experts.experts.<n>).

    gated: rows of linear_fc1 are gate, then up, on each rank.   CheckpointError names a tensor that ranks disagree on.
    """
    tp_size = 1 + max(rank.tp for rank in ranks)
    layer_starts = _layer_starts(ranks)
    experts = _experts_per_rank(ranks)
    holders: dict[str, list[tuple[RankFile, str]]] = defaultdict(list)
    for rank in ranks:
        for name in rank.file.tensors:
            holders[_global_name(name, layer_starts[rank.pp], rank.ep * experts)].append((rank, name))
    return {name: _stored(name, held, files, tp_size, gated) for name, held in holders.items()}


def _stored(
    name: str, held: list[tuple[RankFile, str]], files: PlainFiles, tp_size: int, gated: bool
) -> Stored:
    """The whole of a tensor from those who hold a part of it."""
    dim = 0 if _matches(name, COLUMNS) else 1 if _matches(name, ROWS) else None
    first: dict[int, tuple[RankFile, str]] = {}
    for rank, local in held:
        part = rank.tp if dim is not None else 0
        if part in first:
            _check_equal(name, first[part], (rank, local), files)
        first.setdefault(part, (rank, local))
    parts = tp_size if dim is not None else 1
    if set(first) != set(range(parts)):
        raise CheckpointError(f"tensor {name} is on tensor-parallel ranks {sorted(first)} only, of {parts}.")
    rank, local = first[0]
    shape = files.shape(rank.file.weights, local)
    dtype = files.dtype(rank.file.weights, local)
    for other, other_local in first.values():
        found = files.shape(other.file.weights, other_local), files.dtype(other.file.weights, other_local)
        if found != (shape, dtype):
            raise CheckpointError(f"tensor {name} is {shape} on {rank.file.source}, {found[0]} on {other.file.source}.")
    if dim is None:
        return Stored(name, shape, dtype, (Piece(rank.file.weights, local, (0,) * len(shape), shape),))
    if len(shape) <= dim:
        raise CheckpointError(f"tensor {name} has the shape {list(shape)}, which no product has.")
    halves = 2 if gated and re.fullmatch(GATED, name) else 1
    whole = (*shape[:dim], shape[dim] * parts, *shape[dim + 1 :])
    pieces = [piece for part in range(parts) for piece in _pieces(first[part], part, parts, dim, shape, halves)]
    return Stored(name, whole, dtype, tuple(pieces))


def _pieces(
    holder: tuple[RankFile, str], part: int, parts: int, dim: int, shape: Shape, halves: int
) -> list[Piece]:
    """What one rank holds: one rectangle, or two of a gated product, of which each is split by itself."""
    rank, local = holder
    size = shape[dim] // halves
    if size * halves != shape[dim]:
        raise CheckpointError(f"{rank.file.source}: {local} {list(shape)} is no gate and up of the same height.")
    found = []
    for half in range(halves):
        offset = [0] * len(shape)
        offset[dim] = (half * parts + part) * size
        part_shape = (*shape[:dim], size, *shape[dim + 1 :])
        found.append(Piece(rank.file.weights, local, tuple(offset), part_shape, dim, half * size))
    return found


def _check_equal(name: str, one: tuple[RankFile, str], other: tuple[RankFile, str], files: PlainFiles) -> None:
    values = [files.read(rank.file.weights, local) for rank, local in (one, other)]
    if values[0].shape != values[1].shape or not torch.equal(*values):
        raise CheckpointError(
            f"tensor {name} should be the same on {one[0].file.source} and {other[0].file.source}, but differs: the "
            f"ranks drifted apart, or the files belong to different checkpoints."
        )


def _layer_starts(ranks: Sequence[RankFile]) -> dict[int, int]:
    """The global number of the first layer of each pipeline rank."""
    counts: dict[int, int] = {}
    for rank in ranks:
        numbers = {int(match[1]) for name in rank.file.tensors if (match := LAYER.fullmatch(name))}
        if numbers != set(range(len(numbers))) or counts.setdefault(rank.pp, len(numbers)) != len(numbers):
            raise CheckpointError(f"{rank.file.source} has the layers {sorted(numbers)}, expected 0, 1, ... as peers.")
    return {pp: sum(counts[before] for before in range(pp)) for pp in counts}


def _experts_per_rank(ranks: Sequence[RankFile]) -> int:
    """The same everywhere; 0 without experts."""
    found = {}
    for rank in ranks:
        matches = [LOCAL_EXPERT.fullmatch(name) for name in rank.file.tensors]
        numbers = {int(match[2]) for match in matches if match}
        numbers |= {int(match[3]) for name in rank.file.tensors if (match := GROUPED_EXPERT.fullmatch(name))}
        if numbers:
            found[rank.file.source] = 1 + max(numbers)
    if len(set(found.values())) > 1:
        raise CheckpointError(f"ranks hold different numbers of experts: {found}.")
    return next(iter(found.values()), 0)


def _global_name(name: str, first_layer: int, first_expert: int) -> str:
    if match := LAYER.fullmatch(name):
        name = f"decoder.layers.{int(match[1]) + first_layer}.{match[2]}"
    if match := LOCAL_EXPERT.fullmatch(name):
        return f"{match[1]}experts.{int(match[2]) + first_expert}.{match[3]}"
    if match := GROUPED_EXPERT.fullmatch(name):
        return f"{match[1]}experts.{int(match[3]) + first_expert}.{match[2]}"
    return name


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _size(arguments: Mapping[str, object], name: str) -> int:
    value = arguments.get(name, 1)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"args.{name} is {value!r}, expected a number of ranks.")
    return value
