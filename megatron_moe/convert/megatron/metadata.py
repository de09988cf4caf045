"""`.metadata` of torch.distributed.checkpoint, read out of stand-ins: which rectangle of which tensor lies where."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from megatron_moe.checkpoint.tensor_file import DTYPE_NAMES
from megatron_moe.convert.megatron.ignored import why_ignored
from megatron_moe.convert.megatron.inert import Inert
from megatron_moe.convert.megatron.restricted import Refused

TYPE_NAMES = {str(dtype): name for dtype, name in DTYPE_NAMES.items()}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredPiece:
    """A rectangle of the tensor `name` as `length` bytes of a file, from byte `start` on. dtype: safetensors' name."""

    name: str
    dtype: str
    offset: Shape
    shape: Shape
    file: str
    start: int
    length: int


def model_pieces(metadata: Inert) -> tuple[list[StoredPiece], dict[str, Shape], dict[str, str]]:
    """Pieces of the model's tensors, widest types first; their whole shapes; and what is ignored, with the reason.

    Refused for what such a file never says.
    """
    fields = metadata.fields()
    places = _places(fields.get("storage_data"))
    pieces: list[StoredPiece] = []
    shapes: dict[str, Shape] = {}
    ignored: dict[str, str] = {}
    for name, told in _table(fields.get("state_dict_metadata"), "state_dict_metadata").items():
        reason = why_ignored(name)
        if reason is not None:
            ignored[name] = reason
            continue
        kind = _named(told, "TensorStorageMetadata", f"the entry of {name}")
        shapes[name] = _numbers(kind.get("size"))
        dtype = _dtype(kind.get("properties"), name)
        for chunk in _listed(kind.get("chunks"), f"the pieces of {name}"):
            part = _named(chunk, "ChunkStorageMetadata", f"a piece of {name}")
            pieces.append(_piece(name, dtype, _numbers(part.get("offsets")), _numbers(part.get("sizes")), places))
    widths = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}
    return sorted(pieces, key=lambda piece: -widths[piece.dtype]), shapes, ignored


def _piece(name: str, dtype: str, offset: Shape, shape: Shape, places: dict[Any, dict[str, Any]]) -> StoredPiece:
    place = places.get((name, offset)) or (places.get((name, ())) if not any(offset) else None)
    if place is None:
        raise Refused(f".metadata says of no file that it holds {name} from {list(offset)} on")
    file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
    if not isinstance(file, str) or "/" in file or file.startswith("."):
        raise Refused(f".metadata: {name} is said to be in {file!r}, which is no plain file name")
    if not isinstance(start, int) or not isinstance(length, int) or min(start, length) < 0:
        raise Refused(f".metadata: {name} is said to be at {start!r}, {length!r} bytes")
    if place.get("transform_descriptors"):
        raise Refused(f".metadata: {name} is transformed ({place['transform_descriptors']}), which is not read")
    return StoredPiece(name, dtype, offset, shape, file, start, length)


def _places(storage: Any) -> dict[Any, dict[str, Any]]:
    """(name, offset) -> fields of _StorageInfo; the offset of what is no tensor is ()."""
    found: dict[Any, dict[str, Any]] = {}
    if not isinstance(storage, dict):
        raise Refused(".metadata has no storage_data")
    for index, place in storage.items():
        where = _named(index, "MetadataIndex", "a key of storage_data")
        offset = () if where.get("offset") is None else _numbers(where["offset"])
        found[str(where.get("fqn")), offset] = _named(place, "_StorageInfo", "a value of storage_data")
    return found


def _dtype(properties: Any, name: str) -> str:
    """The first of the state of TensorProperties."""
    if not isinstance(properties, Inert) or not isinstance(properties.state, tuple) or not properties.state:
        raise Refused(f".metadata says no type of {name}")
    dtype = properties.state[0]
    word = dtype.__dict__.get("full_name", "") if isinstance(dtype, type) else str(dtype)
    if word not in TYPE_NAMES:
        raise Refused(f".metadata: {name} has the type {word!r}, which is no plain number")
    return TYPE_NAMES[word]


def _named(value: Any, kind: str, told: str) -> dict[str, Any]:
    if not isinstance(value, Inert) or value.full_name.rpartition(".")[2] != kind:
        raise Refused(f".metadata: {told} is a {getattr(value, 'full_name', type(value).__name__)}, expected a {kind}")
    return value.fields()


def _table(value: Any, told: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise Refused(f".metadata: {told} is no table of names")
    return value


def _listed(value: Any, told: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refused(f".metadata: {told} are no list")
    return value


def _numbers(size: Any) -> Shape:
    """torch.Size, made of one tuple; or a tuple."""
    numbers = size.arguments[0] if isinstance(size, Inert) and len(size.arguments) == 1 else size
    if not isinstance(numbers, tuple | list) or not all(isinstance(one, int) and one >= 0 for one in numbers):
        raise Refused(f".metadata: {numbers!r} is no shape")
    if prod(numbers) > 1 << 50:
        raise Refused(f".metadata: {numbers!r} is larger than any tensor")
    return tuple(numbers)
