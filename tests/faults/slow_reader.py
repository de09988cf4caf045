"""Reads a checkpoint as its description says, with json and numpy alone: nothing of the package has a hand in it."""

import json
from pathlib import Path

import numpy as np

DTYPES = {"F64": np.float64, "F32": np.float32, "BF16": np.uint16, "I64": np.int64, "I32": np.int32, "BOOL": np.bool_}
Tensors = dict[str, np.ndarray]


def read_tensors(folder: Path) -> Tensors:
    """Every logical tensor, by "part/name"; bfloat16 as its bits. Fails unless the slices fill each exactly once."""
    parts = json.loads((folder / "MANIFEST.json").read_text())["parts"]
    found = {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            whole = np.zeros(tensor["shape"], DTYPES[tensor["dtype"]])
            filled = np.zeros(tensor["shape"], np.int8)
            for piece in tensor["slices"]:
                with (folder / piece["file"]).open("rb") as file:
                    file.seek(piece["start"])
                    values = np.frombuffer(file.read(piece["length"]), whole.dtype).reshape(piece["shape"])
                place = tuple(slice(at, at + size) for at, size in zip(piece["offset"], piece["shape"], strict=True))
                whole[place] = values
                filled[place] += 1
            assert (filled == 1).all(), (part, name)
            found[f"{part}/{name}"] = whole
    return found


def differences(found: Tensors, wanted: Tensors) -> list[str]:
    """Names of tensors that are in one alone, or whose bits, type or shape are not the same."""
    names = found.keys() | wanted.keys()
    return sorted(name for name in names if not _same(found.get(name), wanted.get(name)))


def _same(one: "np.ndarray | None", other: "np.ndarray | None") -> bool:
    if one is None or other is None:
        return False
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
