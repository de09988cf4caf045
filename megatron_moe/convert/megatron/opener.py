"""The child process that opens a Megatron checkpoint's pickles, and leaves plain files: safetensors, and JSON of names.

    python -I -c '...' CHECKPOINT OUTPUT ISOLATION      made by child.py, which says how

OUTPUT/opened.json   {"isolation": ..., "files": [{"source", "args", "iteration", "tensors", "ignored"}, ...]}
    tensors          torch_dist: name -> {"shape", "pieces": [[key, offset], ...]}   torch: name -> {}, its own key
OUTPUT/<n>.safetensors   key -> numbers
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, bytes_of, header_bytes
from megatron_moe.config.errors import MegatronMoEError
from megatron_moe.convert.megatron.child import INDEX
from megatron_moe.convert.megatron.folder import Iteration, iteration_at
from megatron_moe.convert.megatron.ignored import why_ignored
from megatron_moe.convert.megatron.inert import Inert, plain
from megatron_moe.convert.megatron.isolation import Forbidden, limit_resources, refuse_side_effects
from megatron_moe.convert.megatron.metadata import StoredPiece, model_pieces
from megatron_moe.convert.megatron.restricted import Refused, load_file, load_metadata, load_tensor

GIB = 1 << 30
Entry = tuple[str, str, tuple[int, ...]]  # key, type, shape


def main(arguments: Sequence[str]) -> int:
    """0, or 65 with a sentence on standard error."""
    folder, output, isolation = Path(arguments[0]), Path(arguments[1]), arguments[2]
    try:
        iteration = iteration_at(folder)
        torch.set_num_threads(1)
        limit_resources(
            memory=4 * iteration.largest + 2 * GIB,
            file_bytes=2 * iteration.num_bytes + GIB,
            cpu_seconds=600 + 60 * (iteration.num_bytes // GIB),
        )
        refuse_side_effects(output)
        write_plain(iteration, output, isolation)
    except (Refused, Forbidden, MegatronMoEError, MemoryError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 65
    return 0


def write_plain(iteration: Iteration, output: Path, isolation: str) -> None:
    """The plain files of a checkpoint. Raises Refused for what no checkpoint of Megatron holds."""
    read = _distributed if iteration.kind == "torch_dist" else _by_rank
    index = {"isolation": isolation, "files": read(iteration, output)}
    (output / INDEX).write_text(json.dumps(index))


def _distributed(iteration: Iteration, output: Path) -> list[dict[str, Any]]:
    """The one entry of a torch_dist folder; optimizer state is not opened."""
    common = load_file(iteration.folder / "common.pt")
    pieces, shapes, ignored = model_pieces(load_metadata(iteration.folder / ".metadata"))
    entries = [(str(number), piece.dtype, piece.shape) for number, piece in enumerate(pieces)]
    _write(output / "0.safetensors", entries, _read_pieces(iteration.folder, pieces))
    tensors: dict[str, Any] = {name: {"shape": shape, "pieces": []} for name, shape in shapes.items()}
    for number, piece in enumerate(pieces):
        tensors[piece.name]["pieces"].append([str(number), piece.offset])
    return [_entry(common, "common.pt", tensors, ignored)]


def _by_rank(iteration: Iteration, output: Path) -> list[dict[str, Any]]:
    """One entry for each file of the format torch."""
    return [_rank_file(path, output / f"{number}.safetensors") for number, path in enumerate(iteration.pickles)]


def _rank_file(path: Path, output: Path) -> dict[str, Any]:
    state = load_file(path)
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        chunked = isinstance(state, dict) and "model0" in state
        raise Refused(
            f"{path} holds model chunks (interleaved pipeline stages), which are not merged; save it as torch_dist"
            if chunked
            else f"{path} holds no model"
        )
    tensors: dict[str, Tensor] = {}
    ignored = {key: "not the model" for key in state if key not in ("model", "args", "iteration")}
    for name, value in model.items():
        reason = why_ignored(name)
        if reason is not None:
            ignored[name] = reason
        elif isinstance(value, Tensor):
            tensors[name] = value.detach()
        else:
            raise Refused(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
    entries = [(name, _dtype_name(name, value.dtype), tuple(value.shape)) for name, value in tensors.items()]
    _write(output, entries, (value.contiguous() for value in tensors.values()))
    return _entry(state, path.parent.name, {name: {} for name in tensors}, ignored)


def _entry(state: Any, source: str, tensors: dict[str, Any], ignored: dict[str, str]) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise Refused(f"{source} is a {type(state).__name__}, expected a table")
    arguments = state.get("args")
    if not isinstance(arguments, Inert):
        raise Refused(f"{source} holds no args, from which the model's shape is known")
    return {
        "source": source,
        "args": plain(arguments.fields()),
        "iteration": plain(state.get("iteration")),
        "tensors": tensors,
        "ignored": ignored,
    }


def _read_pieces(folder: Path, pieces: Iterable[StoredPiece]) -> Iterator[Tensor]:
    """One at a time."""
    for piece in pieces:
        told = f"{piece.file}, bytes {piece.start:,} to {piece.start + piece.length:,} ({piece.name})"
        with (folder / piece.file).open("rb") as file:
            file.seek(piece.start)
            data = file.read(piece.length)
        if len(data) != piece.length:
            raise Refused(f"{told}: the file ends before")
        tensor = load_tensor(data, told)
        if tuple(tensor.shape) != piece.shape or tensor.dtype != DTYPES[piece.dtype]:
            raise Refused(f"{told} is {tensor.dtype} {list(tensor.shape)}, .metadata says {piece.dtype} {piece.shape}")
        yield tensor.contiguous()


def _dtype_name(name: str, dtype: torch.dtype) -> str:
    if dtype not in DTYPE_NAMES:
        raise Refused(f"{name} has the type {dtype}, which is no plain number")
    return DTYPE_NAMES[dtype]


def _write(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> None:
    """A safetensors file; the tensors come in the order of the entries."""
    ordered = sorted(range(len(entries)), key=lambda number: -DTYPES[entries[number][1]].itemsize)
    if ordered != list(range(len(entries))):  # wide types first, so that each lies aligned
        known = list(tensors)
        tensors = [known[number] for number in ordered]
        entries = [entries[number] for number in ordered]
    with path.open("wb") as file:
        file.write(header_bytes(entries, {}))
        for tensor in tensors:
            file.write(bytes_of(tensor).data)
