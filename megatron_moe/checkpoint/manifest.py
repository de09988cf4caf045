"""MANIFEST.json: what a checkpoint consists of. Written last; its last line is the SHA-256 of all before it.

    {
    "schema": 1, "run_id": "run", "step": 12000, "code_version": "0.1.0",
    "layout": {"world_size": 8},                                     for people only
    "totals": {"tensors": 2, "elements": 96, "bytes": 384, "experts": {...}},
    "files": {"model-r00000.safetensors": {"size": 512, "header": 128, "header_xxh3": "..."}, ...},
    "parts": {"model": {"output.weight": {"dtype": "F32", "shape": [8, 4], "slices": [{"file": ..., "start": 128,
              "length": 64, "offset": [0, 0], "shape": [4, 4], "xxh3": "..."}, ...]}, ...}, "optim": {...}},
    "sha256": "..."}

Each slice is a rectangle of a logical tensor, row-major, at bytes start..start+length of its file. The bytes of every
tensor file are its header and its slices, nothing else, so the xxh3 of those cover the file. If asked for, the table of
files also has the SHA-256 of each ("sha256"), which it always has of the JSON files.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from math import prod
from typing import Any

from megatron_moe.checkpoint.reshard import Rectangle, first_hole, overlapping_pair
from megatron_moe.checkpoint.tensor_file import DTYPES, HEADER_LIMIT_BYTES
from megatron_moe.config.errors import CheckpointError

MANIFEST = "MANIFEST.json"
SCHEMA = 1
TEXT_FILES = ("state.json", "config.json", "data.json")
# far above the tables of any model; a larger one is an attack or an accident
MANIFEST_LIMIT_BYTES = 1 << 30
PART_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TENSOR_FILE = re.compile(r"[a-z][a-z0-9_]{0,31}-r[0-9]{5,7}\.safetensors")
_LAST_LINE = re.compile(rb'"sha256": "([0-9a-f]{64})"}\n')
_DIGESTS = {kind: re.compile(f"[0-9a-f]{{{n}}}") for kind, n in (("sha256", 64), ("xxh3", 32), ("header_xxh3", 32))}
_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True)
class StoredSlice:
    """One rectangle of a logical tensor and the bytes that hold it."""

    file: str
    start: int
    length: int
    rectangle: Rectangle
    xxh3: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A logical tensor; the slices tile it exactly. dtype: safetensors' name, as "BF16"."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[StoredSlice, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class StoredFile:
    """A file beside the manifest. sha256: "" if unknown.  header: bytes before the first slice, 0 for a JSON file."""

    size: int
    sha256: str
    header: int = 0
    header_xxh3: str = ""


@dataclass(frozen=True)
class Manifest:
    """The table of a checkpoint; parts["model"]["output.weight"] is a tensor."""

    run_id: str
    step: int
    code_version: str
    layout: dict[str, Any]
    totals: dict[str, Any]
    files: dict[str, StoredFile]
    parts: dict[str, dict[str, StoredTensor]] = field(repr=False)

    @property
    def without_sha256(self) -> list[str]:
        """Files whose SHA-256 is not known."""
        return [name for name, file in self.files.items() if not file.sha256]

    def to_text(self) -> str:
        """The whole file, its own hash included."""
        sections = [
            f'"schema": {SCHEMA}, "run_id": {json.dumps(self.run_id)}, "step": {self.step}, '
            f'"code_version": {json.dumps(self.code_version)}',
            f'"layout": {json.dumps(self.layout)}',
            f'"totals": {json.dumps(self.totals)}',
            _table("files", [f"{json.dumps(name)}: {json.dumps(_file(file))}" for name, file in self.files.items()]),
            _table("parts", [_table(part, _tensor_lines(tensors)) for part, tensors in self.parts.items()]),
        ]
        body = "{\n" + ",\n".join(sections) + ",\n"
        return f'{body}"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"}}\n'


def _table(name: str, lines: list[str]) -> str:
    return f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}"


def _file(file: StoredFile) -> dict[str, Any]:
    found: dict[str, Any] = {"size": file.size} | ({"sha256": file.sha256} if file.sha256 else {})
    return found | ({"header": file.header, "header_xxh3": file.header_xxh3} if file.header else {})


def _tensor_lines(tensors: dict[str, StoredTensor]) -> list[str]:
    return [
        f'{json.dumps(name)}: {{"dtype": "{tensor.dtype}", "shape": {list(tensor.shape)}, '
        f'"slices": [{", ".join(map(_slice, tensor.slices))}]}}'
        for name, tensor in tensors.items()
    ]


def _slice(part: StoredSlice) -> str:
    # written out: there may be a hundred thousand, and their names are known to need no escape
    offset, shape = list(part.rectangle.offset), list(part.rectangle.shape)
    return (
        f'{{"file": "{part.file}", "start": {part.start}, "length": {part.length}, "offset": {offset}, '
        f'"shape": {shape}, "xxh3": "{part.xxh3}"}}'
    )


def parse_manifest(data: bytes) -> Manifest:
    """Read and check a manifest; what it says is then consistent in itself. Raises CheckpointError."""
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise CheckpointError(f"{MANIFEST} has {len(data):,} bytes; at most {MANIFEST_LIMIT_BYTES:,} are read")
    cut = data.rfind(b"\n", 0, -1) + 1
    said = _LAST_LINE.fullmatch(data[cut:])
    if not said:
        raise CheckpointError(f"{MANIFEST} is cut or damaged: its last line is not its SHA-256")
    if hashlib.sha256(data[:cut]).hexdigest().encode() != said[1]:
        raise CheckpointError(f"{MANIFEST} is damaged: its SHA-256 is not the one in its last line")
    try:
        found = json.loads(data)
        return _checked(found)
    except CheckpointError as error:
        raise CheckpointError(f"{MANIFEST}: {error}") from None
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is not of this form: {type(error).__name__}: {error}") from error


def _checked(found: dict[str, Any]) -> Manifest:
    if _whole(found["schema"]) != SCHEMA:
        raise CheckpointError(f"schema {found['schema']} is unknown; this version reads {SCHEMA}: update megatron_moe")
    manifest = Manifest(
        run_id=_text(found["run_id"]),
        step=_whole(found["step"]),
        code_version=_text(found["code_version"]),
        layout=dict(found["layout"]),
        totals=dict(found["totals"]),
        files={_file_name(name): _read_file(name, entry) for name, entry in found["files"].items()},
        parts={
            _part_name(part): {_text(name): _read_tensor(name, entry) for name, entry in tensors.items()}
            for part, tensors in found["parts"].items()
        },
    )
    for name in TEXT_FILES:
        if name not in manifest.files:
            raise CheckpointError(f"{name} is missing from the file table")
    for part, tensors in manifest.parts.items():
        for name, tensor in tensors.items():
            _check_tiling(f"{part} tensor '{name}'", tensor)
    _check_bytes(manifest)
    return manifest


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise CheckpointError(f"{value!r} is not a count")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or not 0 < len(value) <= 4096:
        raise CheckpointError(f"{str(value)[:80]!r} is not a name")
    return value


def _digest(entry: dict[str, Any], kind: str) -> str:
    value = entry[kind]
    if type(value) is not str or not _DIGESTS[kind].fullmatch(value):
        raise CheckpointError(f"{str(value)[:80]!r} is not a {kind} digest")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if type(value) is not list or len(value) > 16:
        raise CheckpointError(f"{str(value)[:80]} is not a shape")
    return tuple(_whole(length) for length in value)


def _file_name(name: str) -> str:
    # a closed list of forms: no separator, no "..", no absolute path can match
    if name not in TEXT_FILES and not _TENSOR_FILE.fullmatch(name):
        known = ", ".join(TEXT_FILES)
        raise CheckpointError(f"refuses the file name {name[:200]!r}: known are <part>-rNNNNN.safetensors, {known}")
    return name


def _part_name(name: str) -> str:
    if not PART_NAME.fullmatch(name):
        raise CheckpointError(f"refuses the part name {name[:200]!r}")
    return name


def _read_file(name: str, entry: dict[str, Any]) -> StoredFile:
    size = _whole(entry["size"])
    if name in TEXT_FILES:
        return StoredFile(size, _digest(entry, "sha256"))
    sha256 = _digest(entry, "sha256") if "sha256" in entry else ""
    header = _whole(entry["header"])
    if header > HEADER_LIMIT_BYTES:
        raise CheckpointError(f"{name} has a header of {header:,} bytes; at most {HEADER_LIMIT_BYTES:,} are read")
    if not 8 < header <= size:
        raise CheckpointError(f"{name} of {size:,} bytes cannot have a header of {header:,}")
    return StoredFile(size, sha256, header, _digest(entry, "header_xxh3"))


def _read_tensor(name: str, entry: dict[str, Any]) -> StoredTensor:
    dtype = _text(entry["dtype"])
    if dtype not in DTYPES:
        raise CheckpointError(f"tensor '{name}' has the unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    shape = _shape(entry["shape"])
    slices = tuple(
        StoredSlice(
            file=_text(part["file"]),
            start=_whole(part["start"]),
            length=_whole(part["length"]),
            rectangle=Rectangle(_shape(part["offset"]), _shape(part["shape"])),
            xxh3=_digest(part, "xxh3"),
        )
        for part in entry["slices"]
    )
    for part in slices:
        if not part.rectangle.fits(shape) or part.rectangle.volume == 0:
            raise CheckpointError(f"tensor '{name}' of shape {list(shape)} cannot hold a slice {part.rectangle}")
        if part.length != part.rectangle.volume * DTYPES[dtype].itemsize:
            raise CheckpointError(
                f"tensor '{name}': slice {part.rectangle} of {dtype} cannot have {part.length:,} bytes"
            )
    return StoredTensor(dtype, shape, slices)


def _check_tiling(what: str, tensor: StoredTensor) -> None:
    rectangles = [part.rectangle for part in tensor.slices]
    pair = overlapping_pair(rectangles)
    if pair:
        raise CheckpointError(f"{what}: slices {rectangles[pair[0]]} and {rectangles[pair[1]]} overlap")
    if sum(rectangle.volume for rectangle in rectangles) != tensor.num_elements:
        raise CheckpointError(f"{what}: no slice holds {first_hole(tensor.shape, rectangles)}")


def _check_bytes(manifest: Manifest) -> None:
    """The slices of each file follow each other from its header to its end: no byte is used twice, or by nobody."""
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.files if name not in TEXT_FILES}
    for tensors in manifest.parts.values():
        for name, tensor in tensors.items():
            for part in tensor.slices:
                if part.file not in ranges:
                    raise CheckpointError(
                        f"tensor '{name}' is said to be in {part.file[:200]!r}, no tensor file of these"
                    )
                ranges[part.file].append((part.start, part.length))
    for file, found in ranges.items():
        position = manifest.files[file].header
        for start, length in sorted(found):
            if start != position:
                kind = "hole" if start > position else "overlap"
                raise CheckpointError(f"{file}: {kind} at byte {min(start, position):,}")
            position += length
        if position != manifest.files[file].size:
            size = manifest.files[file].size
            raise CheckpointError(f"{file}: the slices end at byte {position:,}, but it is said to have {size:,}")
