"""The first rank's work: put all ranks' tables together, refuse what does not fit, write the manifest, rename."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatron_moe.checkpoint.manifest import MANIFEST, Manifest, StoredSlice, StoredTensor
from megatron_moe.checkpoint.names import absent_experts, expert_name, folded
from megatron_moe.checkpoint.reshard import Rectangle, first_hole, overlapping_pair
from megatron_moe.checkpoint.storage import Storage, write_file
from megatron_moe.checkpoint.write import HeldSlice, RankTable
from megatron_moe.config.errors import CheckpointError, ReplicaError, StorageError
from megatron_moe.parallel.copies import dissent

# (rank, slice)
Held = tuple[int, HeldSlice]


def assemble(tables: Sequence[RankTable], run_id: str, step: int, code_version: str) -> Manifest:
    """The manifest of what the ranks wrote.

    Raises StorageError if a rank's disk failed; CheckpointError if a tensor has a hole or an overlap, if ranks disagree
    about its shape, or if an expert is absent; ReplicaError if nothing is wrong but that replicas differ.
    """
    for storage, error in ((False, CheckpointError), (True, StorageError)):
        told = enumerate(tables)
        failed = [f"rank {rank}: {table.problem}" for rank, table in told if table.problem and table.storage == storage]
        if failed:
            raise error(_listing(failed, limit=3))
    held: dict[str, dict[str, list[Held]]] = defaultdict(lambda: defaultdict(list))
    for rank, table in enumerate(tables):
        for piece in table.slices:
            held[piece.part][piece.name].append((rank, piece))
    problems: list[str] = []
    drifted: list[str] = []
    parts = {
        part: {name: _tensor(f"{part} tensor '{name}'", tensors[name], problems, drifted) for name in sorted(tensors)}
        for part, tensors in sorted(held.items())
    }
    absent = folded(absent_experts(parts.get("model", {})))
    problems += [f"model tensor '{name}' is written by no rank, but those of other experts are" for name in absent]
    if problems:
        raise CheckpointError(_listing(problems + drifted, limit=10))
    if drifted:
        raise ReplicaError(_listing(drifted, limit=10))
    return Manifest(
        run_id=run_id,
        step=step,
        code_version=code_version,
        layout={"world_size": len(tables)},
        totals=_totals(parts),
        files={name: file for table in tables for name, file in table.files.items()},
        parts=parts,
    )


def _listing(problems: Sequence[str], limit: int) -> str:
    more = f"\n... and {len(problems) - limit} more" if len(problems) > limit else ""
    return "\n".join(problems[:limit]) + more


def _tensor(what: str, held: Sequence[Held], problems: list[str], drifted: list[str]) -> StoredTensor:
    rank, first = held[0]
    if len(held) == 1 and first.primary and first.length and first.rectangle.shape == first.global_shape:
        # most tensors: all of it on one rank
        whole = StoredSlice(first.file, first.start, first.length, first.rectangle, first.xxh3)
        return StoredTensor(first.dtype, first.global_shape, (whole,))
    for other, piece in held:
        if (piece.dtype, piece.global_shape) != (first.dtype, first.global_shape):
            problems.append(
                f"{what} is {first.dtype} {list(first.global_shape)} on rank {rank}, "
                f"but {piece.dtype} {list(piece.global_shape)} on rank {other}"
            )
            return StoredTensor(first.dtype, first.global_shape, ())
    written = [(other, piece) for other, piece in held if piece.primary and piece.length]
    problem = _tiling_problem(what, first.global_shape, written) or _stray_replica(what, held, written)
    problems += [problem] if problem else []
    drifted += [] if problem else _drifted_replicas(what, held)
    slices = (StoredSlice(piece.file, piece.start, piece.length, piece.rectangle, piece.xxh3) for _, piece in written)
    return StoredTensor(first.dtype, first.global_shape, tuple(sorted(slices, key=lambda part: part.rectangle.offset)))


def _tiling_problem(what: str, shape: tuple[int, ...], written: Sequence[Held]) -> str:
    rectangles = [piece.rectangle for _, piece in written]
    pair = overlapping_pair(rectangles)
    if pair:
        (one, first), (two, second) = written[pair[0]], written[pair[1]]
        return f"{what}: {first.rectangle} of rank {one} and {second.rectangle} of rank {two} would both be written"
    hole = first_hole(shape, rectangles) if sum(r.volume for r in rectangles) != Rectangle.whole(shape).volume else None
    return f"{what} of shape {list(shape)}: no rank writes {hole}" if hole else ""


def _stray_replica(what: str, held: Sequence[Held], written: Sequence[Held]) -> str:
    rectangles = {piece.rectangle for _, piece in written}
    for rank, piece in held:
        if piece.rectangle.volume and piece.rectangle not in rectangles:
            return f"{what}: rank {rank} holds a replica of {piece.rectangle}, which no rank writes as such"
    return ""


def _drifted_replicas(what: str, held: Sequence[Held]) -> list[str]:
    hashes: dict[Rectangle, dict[int, str]] = defaultdict(dict)
    for rank, piece in held:
        hashes[piece.rectangle][rank] = piece.xxh3
    said = {rectangle: dissent(by_rank) for rectangle, by_rank in hashes.items()}
    return [
        f"{what} {rectangle} should be the same on all its holders, but {words}: replicas have drifted apart "
        f"(a missing gradient sum, or a faulty device)"
        for rectangle, words in said.items()
        if words
    ]


def _totals(parts: dict[str, dict[str, StoredTensor]]) -> dict[str, Any]:
    tensors = [tensor for found in parts.values() for tensor in found.values()]
    return {
        "tensors": len(tensors),
        "elements": sum(tensor.num_elements for tensor in tensors),
        "bytes": sum(part.length for tensor in tensors for part in tensor.slices),
        "experts": {
            part: {name: fingerprint(tensor) for name, tensor in found.items() if expert_name(name)}
            for part, found in parts.items()
        },
    }


def fingerprint(tensor: StoredTensor) -> str:
    """One hash for a tensor, comparable between tensors that are cut the same way."""
    text = "".join(f"{part.rectangle}{part.xxh3}" for part in tensor.slices)
    return xxhash.xxh3_128_hexdigest(f"{tensor.dtype}{tensor.shape}{text}".encode())


def twin_experts(tensors: Mapping[str, StoredTensor]) -> list[tuple[str, str]]:
    """Experts of one layer that hold the same numbers: (name, first of the same), as after a wrong gather.

    Vectors are passed over: the biases of all experts begin at zero.
    """
    seen: dict[tuple[str, str, str], str] = {}
    twins = []
    for name, tensor in tensors.items():
        expert = expert_name(name)
        if expert and len(tensor.shape) > 1:
            first = seen.setdefault((expert.layer, expert.weight, fingerprint(tensor)), name)
            if first != name:
                twins.append((name, first))
    return twins


def check_sizes(manifest: Manifest, folder: Path) -> None:
    """What the ranks wrote must be here, whole: StorageError when storage lost bytes, or is not shared by all nodes."""
    for name, file in manifest.files.items():
        check_size(folder / name, file.size)


def check_size(path: Path, written: int) -> None:
    """The same for one file, of which so many bytes were written."""
    try:
        size = os.lstat(path).st_size
    except FileNotFoundError:
        raise StorageError(
            f"{path} was written by its rank but is not seen by the first rank: "
            f"the checkpoint folder must be on storage that all nodes share"
        ) from None
    if size != written:
        raise StorageError(f"{path} has {size:,} bytes on storage, but {written:,} were written")


def commit(storage: Storage, manifest: Manifest, folder: Path, final: Path) -> None:
    """Write the manifest, then make the folder visible under its final name; anything of that name is put aside.

    Each step is on the disk before the next begins. Raises OSError, StorageError.
    """
    check_sizes(manifest, folder)
    text = manifest.to_text().encode()
    write_file(storage, folder / MANIFEST, memoryview(text))
    check_size(folder / MANIFEST, len(text))
    storage.sync_dir(folder)
    if os.path.lexists(final):
        storage.rename(final, folder.with_name(folder.name + "-replaced"))
    storage.rename(folder, final)
    storage.sync_dir(final.parent)
