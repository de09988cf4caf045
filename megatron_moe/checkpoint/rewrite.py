"""A checkpoint as if another number of ranks had saved it: the same tensors bit for bit, in other files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_moe.checkpoint.load import CheckpointReader
from megatron_moe.checkpoint.manifest import Manifest
from megatron_moe.checkpoint.reshard import Rectangle, split_rectangle
from megatron_moe.checkpoint.storage import Storage
from megatron_moe.checkpoint.stream import Piece, StreamedCheckpoint, held_nothing, streamed_checkpoint
from megatron_moe.checkpoint.tensor_file import DTYPES, Bytes, bytes_of
from megatron_moe.checkpoint.write import RankTable
from megatron_moe.config.errors import ConfigError

# what is in memory at a time
_SCRATCH_BYTES = 32 << 20
# file names have room for more, nobody has them
_MOST_RANKS = 99_999


def reshard(reader: CheckpointReader, root: Path, num_ranks: int, storage: Storage | None = None) -> Manifest:
    """Write the reader's step into the directory `root` as `num_ranks` ranks would, each its share of every tensor.

    Raises ConfigError if the step is there already, StorageError if the disk fails; nothing is left then.
    """
    if not 1 <= num_ranks <= _MOST_RANKS:
        raise ConfigError(f"--ranks {num_ranks} must be 1 to {_MOST_RANKS:,}.")
    need = int(reader.manifest.totals["bytes"])
    attempt = f"{reader.run_id}-reshard"
    with streamed_checkpoint(
        root,
        reader.step,
        reader.run_id,
        mark=attempt,
        need=need,
        flag="DST",
        sha256=not reader.manifest.without_sha256,
        storage=storage,
    ) as made:
        tables = [RankTable() for _ in range(num_ranks)]
        for part in reader.tensors:
            shares = _shares(reader, part, num_ranks)
            for rank, (table, pieces) in enumerate(zip(tables, shares, strict=True)):
                _write(reader, made, part, rank, pieces, table)
        return made.finish(tables, reader.texts)


def _shares(reader: CheckpointReader, part: str, num_ranks: int) -> list[list[Piece]]:
    """For each rank its pieces, the widest dtype first as in every file, so that all are aligned."""
    shares: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for index, (name, tensor) in enumerate(reader.tensors[part].items()):
        cuts = _cuts(tensor.shape, num_ranks)
        for number, rectangle in enumerate(cuts):
            # what is too small to be cut goes round
            rank = number if len(cuts) > 1 else index % num_ranks
            shares[rank].append(Piece(name, tensor.dtype, tensor.shape, rectangle))
    return [sorted(pieces, key=lambda piece: -DTYPES[piece.dtype].itemsize) for pieces in shares]


def _cuts(shape: tuple[int, ...], parts: int) -> list[Rectangle]:
    """As even as can be along the first dimension that is long enough; the whole if none is."""
    whole = Rectangle.whole(shape)
    dim = next((dim for dim, length in enumerate(shape) if length >= parts), None)
    if dim is None or whole.volume == 0 or parts == 1:
        return [whole]
    edges = [shape[dim] * number // parts for number in range(parts + 1)]
    return [
        Rectangle(
            whole.offset[:dim] + (start,) + whole.offset[dim + 1 :], shape[:dim] + (stop - start,) + shape[dim + 1 :]
        )
        for start, stop in zip(edges, edges[1:], strict=False)
    ]


def _write(
    reader: CheckpointReader,
    made: StreamedCheckpoint,
    part: str,
    rank: int,
    pieces: Sequence[Piece],
    table: RankTable,
) -> None:
    if not any(piece.num_bytes for piece in pieces):
        table.slices.extend(held_nothing(part, piece) for piece in pieces)
        return
    file = made.file(part, rank, pieces)
    for piece in pieces:
        file.write(piece, runs_of(reader, piece.name, piece, part))
    file.finish(table)


def runs_of(reader: CheckpointReader, name: str, piece: Piece, part: str = "model") -> Iterator[Bytes]:
    """The bytes of a piece of the stored tensor `name`, row-major, a little at a time."""
    if piece.num_bytes == 0:
        return
    for wanted in split_rectangle(piece.rectangle, _SCRATCH_BYTES // DTYPES[piece.dtype].itemsize):
        yield bytes_of(reader.rectangle(name, wanted, part))
