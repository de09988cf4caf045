"""Everything that is wrong with a checkpoint, piece by piece: loading stops at the first fault, a person wants all."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from megatron_moe.checkpoint.commit import twin_experts
from megatron_moe.checkpoint.manifest import TEXT_FILES, Manifest
from megatron_moe.checkpoint.names import absent_experts, folded
from megatron_moe.checkpoint.tensor_file import Bytes, read_exactly
from megatron_moe.checkpoint.verify import (
    CHUNK_BYTES,
    Check,
    Stretch,
    digest_of,
    header_length,
    opened,
    read_manifest,
    read_text,
    stretches_of,
)
from megatron_moe.config.errors import CheckpointError


@dataclass
class Inspection:
    """What was found in one checkpoint. problems: why it is not whole; remarks: what is odd in a whole one."""

    folder: Path
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    num_bytes: int = 0
    seconds: float = 0.0
    manifest: Manifest | None = None


def inspect_checkpoint(folder: Path, step: int, check: Check) -> Inspection:
    """Read all of a checkpoint through 8 MiB of memory and name every piece whose checksum is wrong."""
    found = Inspection(folder)
    started = time.monotonic()
    try:
        manifest = found.manifest = read_manifest(folder, step)[0]
    except CheckpointError as error:
        found.problems.append(str(error))
        return found
    for name in TEXT_FILES:
        try:
            read_text(folder, manifest, name)
        except CheckpointError as error:
            found.problems.append(str(error))
    scratch = np.empty(CHUNK_BYTES, dtype=np.uint8)
    stretches = {name: list(group) for name, group in groupby(stretches_of(manifest, check), lambda part: part.file)}
    for name in sorted(set(manifest.files) - set(TEXT_FILES)):
        found.problems += _file_problems(folder / name, manifest, stretches.get(name, []), scratch)
    model = manifest.parts.get("model", {})
    found.problems += [f"model tensor '{name}' is not there" for name in folded(absent_experts(model))]
    found.remarks += [f"experts {first} and {twin} hold the same numbers" for twin, first in twin_experts(model)]
    found.num_bytes = sum(file.size for file in manifest.files.values())
    found.seconds = time.monotonic() - started
    return found


def _file_problems(path: Path, manifest: Manifest, stretches: list[Stretch], scratch: Bytes) -> Iterator[str]:
    file = manifest.files[path.name]
    try:
        with opened(path, file.size):
            pass
    except CheckpointError as error:
        yield str(error)
    try:
        with opened(path, None) as opened_file:
            for stretch in stretches:
                yield from _stretch_problem(opened_file, stretch, file.header, scratch)
    except CheckpointError as error:
        if path.exists():
            yield str(error)


def _stretch_problem(file: int, stretch: Stretch, header: int, scratch: Bytes) -> Iterator[str]:
    where = f"{stretch.file}: {stretch.what}, bytes {stretch.start:,} to {stretch.start + stretch.length:,}"
    try:
        if stretch.start == 0 and header_length(file) != header:
            yield f"{where}: says that it has {header_length(file):,} bytes, but {header:,} were written"
        found = digest_of(file, stretch, scratch)
    except EOFError as error:
        yield f"{where}: {error}"
        return
    if found != stretch.digest:
        yield f"{where}: its {stretch.kind} is {found}, but {stretch.digest} was written"


def raw_read_seconds(found: Inspection) -> float:
    """How long reading the same files takes when nothing is computed."""
    started = time.monotonic()
    scratch = np.empty(CHUNK_BYTES, dtype=np.uint8)
    for name, entry in found.manifest.files.items() if found.manifest else ():
        with opened(found.folder / name, entry.size) as file:
            for start in range(0, entry.size, len(scratch)):
                read_exactly(file, scratch[: min(len(scratch), entry.size - start)], start)
    return time.monotonic() - started
