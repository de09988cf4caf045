"""How two checkpoints differ: tensors, configuration, state; with little in memory, whatever layouts they are of."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.load import CheckpointReader
from megatron_moe.checkpoint.manifest import StoredTensor
from megatron_moe.checkpoint.reshard import Rectangle, split_rectangle
from megatron_moe.checkpoint.tensor_file import DTYPES

# elements of a tensor that are compared at a time
_PART_ELEMENTS = 1 << 20
_ABSENT = object()


@dataclass(frozen=True)
class Values:
    """How the numbers of two tensors of one shape and type differ.

    differing: elements whose bits differ.  max_abs, max_rel: the largest |a - b|, and |a - b| / max(|a|, |b|) of an
    element, over those where both are finite.  not_finite: differing elements where one is not.
    """

    differing: int
    elements: int
    max_abs: float
    max_rel: float
    not_finite: int

    def __str__(self) -> str:
        odd = f", {self.not_finite:,} of them not finite" if self.not_finite else ""
        return (
            f"{self.differing:,} of {self.elements:,} elements differ{odd}; "
            f"largest difference {self.max_abs:.3e}, relative {self.max_rel:.3e}"
        )


def differences(one: CheckpointReader, two: CheckpointReader) -> Iterator[str]:
    """A line for each difference; none when they hold the same."""
    for part in sorted({*one.tensors, *two.tensors}):
        yield from _part_differences(one, two, part)
    for name in ("config.json", "state.json", "data.json"):
        yield from _json_differences(name, _parsed(one.texts[name]), _parsed(two.texts[name]))


def _part_differences(one: CheckpointReader, two: CheckpointReader, part: str) -> Iterator[str]:
    first, second = one.tensors.get(part, {}), two.tensors.get(part, {})
    for name in sorted({*first, *second}):
        what = f"{part} tensor '{name}'"
        a, b = first.get(name), second.get(name)
        if a is None or b is None:
            yield f"{what}: only in the {'second' if a is None else 'first'}"
        elif a.shape != b.shape:
            yield f"{what}: shape {list(a.shape)} / {list(b.shape)}"
        elif a.dtype != b.dtype:
            yield f"{what}: dtype {a.dtype} / {b.dtype}"
        elif not _same_hashes(a, b):
            values = compare_values(one, two, name, part)
            if values.differing:
                yield f"{what}: {values}"


def _same_hashes(a: StoredTensor, b: StoredTensor) -> bool:
    """Cut the same way, with the same checksums, which were looked at when the two were opened: not read again."""
    return [(part.rectangle, part.xxh3) for part in a.slices] == [(part.rectangle, part.xxh3) for part in b.slices]


def compare_values(one: CheckpointReader, two: CheckpointReader, name: str, part: str = "model") -> Values:
    """The numbers of a tensor that both have, in one shape and type."""
    tensor = one.tensors[part][name]
    differing = not_finite = 0
    max_abs = max_rel = 0.0
    for wanted in split_rectangle(Rectangle.whole(tensor.shape), _PART_ELEMENTS):
        if wanted.volume == 0:
            continue
        a, b = (reader.rectangle(name, wanted, part).reshape(-1) for reader in (one, two))
        unequal = _bits_differ(a, b, DTYPES[tensor.dtype].itemsize)
        x, y = a[unequal].double(), b[unequal].double()
        finite = x.isfinite() & y.isfinite()
        differing += len(x)
        not_finite += len(x) - int(finite.sum())
        x, y = x[finite], y[finite]
        if len(x):
            gap = (x - y).abs()
            # zero and minus zero differ in a bit and by nothing
            scale = torch.maximum(x.abs(), y.abs()).clamp_min(torch.finfo(torch.float64).tiny)
            max_abs, max_rel = max(max_abs, gap.max().item()), max(max_rel, (gap / scale).max().item())
    return Values(differing, tensor.num_elements, max_abs, max_rel, not_finite)


def _bits_differ(a: Tensor, b: Tensor, itemsize: int) -> Tensor:
    """(elements,) bool"""
    return (a.view(torch.uint8).view(-1, itemsize) != b.view(torch.uint8).view(-1, itemsize)).any(dim=1)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json_differences(where: str, a: Any, b: Any) -> Iterator[str]:
    """Every value that differs, by its path."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            path = f"{where} {key}" if where.endswith(".json") else f"{where}.{key}"
            yield from _json_differences(path, a.get(key, _ABSENT), b.get(key, _ABSENT))
    elif a != b or type(a) is not type(b):
        yield f"{where}: {_told(a)} / {_told(b)}"


def _told(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
