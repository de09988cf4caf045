"""What the ranks ask for against what is stored: every element filled once, every stored tensor used, or named."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_moe.checkpoint.manifest import StoredTensor
from megatron_moe.checkpoint.names import expert_name, folded, num_experts
from megatron_moe.checkpoint.reshard import Rectangle, first_hole, overlapping_pair
from megatron_moe.checkpoint.tensor_file import DTYPES
from megatron_moe.parallel.blocks import Block

# a name and what is said about it
_Told = tuple[str, str]


@dataclass(frozen=True)
class Demand:
    """What one rank asks for, and how that differs from what is stored.

    asked: the rectangles (offset, shape) that it fills as their first holder; none for a tensor of replicas.
    """

    asked: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    shapes: list[_Told] = field(default_factory=list)
    dtypes: list[_Told] = field(default_factory=list)

    @classmethod
    def of(cls, blocks: Sequence[Block], stored: Mapping[str, StoredTensor], cast: bool) -> "Demand":
        """cast: floating-point types may differ."""
        found = cls()
        for block in blocks:
            asked = found.asked.setdefault(block.name, [])
            if block.primary and block.tensor.numel():
                asked.append((tuple(block.offset), block.shape))
            tensor = stored.get(block.name)
            if tensor is None:
                found.missing.append(block.name)
            elif tensor.shape != tuple(block.global_shape):
                found.shapes.append((block.name, f"stored {list(tensor.shape)}, needed {list(block.global_shape)}"))
            elif DTYPES[tensor.dtype] != block.tensor.dtype:
                floats = DTYPES[tensor.dtype].is_floating_point and block.tensor.dtype.is_floating_point
                if not (cast and floats):
                    way_out = "; pass cast=True to convert" if floats else ""
                    found.dtypes.append((block.name, f"stored {tensor.dtype}, needed {block.tensor.dtype}{way_out}"))
        return found

    def to_text(self) -> str:
        """For the first rank."""
        return json.dumps(vars(self), separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> "Demand":
        """What another rank told."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Account:
    """How a model and a checkpoint differ: what kind of difference, and every tensor that has it."""

    kinds: list[tuple[str, list[_Told]]]
    unused: list[str]
    lost_experts: list[str]

    @classmethod
    def of(cls, demands: Sequence[Demand], stored: Mapping[str, StoredTensor], *, whole: bool) -> "Account":
        """whole: the demands are those of a whole model, of which no element may be left out or filled twice."""
        asked: dict[str, list[Rectangle]] = defaultdict(list)
        for demand in demands:
            for name, rectangles in demand.asked.items():
                asked[name] += [Rectangle(tuple(offset), tuple(shape)) for offset, shape in rectangles]
        shapes = [(name, told) for demand in demands for name, told in demand.shapes]
        dtypes = [(name, told) for demand in demands for name, told in demand.dtypes]
        missing = [(name, "") for demand in demands for name in demand.missing]
        fitting = {name: asked[name] for name in asked if name in stored and name not in dict(shapes)}
        kinds = [
            ("with another number of experts", _other_counts(asked, stored) if whole else []),
            ("not in the checkpoint", missing),
            ("of another shape", shapes),
            ("of another type", dtypes),
            ("not filled exactly once", _not_tiled(fitting, stored) if whole else []),
        ]
        unused = sorted(set(stored) - set(asked))
        layers = num_experts(asked)
        lost = [name for name in unused if (expert := expert_name(name)) and expert.layer in layers]
        return cls(kinds, unused, lost)

    def explain(self, spare: Sequence[str]) -> str:
        """A line for each kind of difference; "" when there is none. spare: the unused that may not be left."""
        kinds = [*self.kinds, ("in the checkpoint only", [(name, "") for name in spare])]
        return "\n".join(f"  {_distinct(told)} {title}: {_listed(told)}" for title, told in kinds if told)


def _distinct(found: Sequence[_Told]) -> int:
    return len({name for name, _ in found})


def _listed(found: Sequence[_Told]) -> str:
    """All of them, in few words."""
    names: dict[str, set[str]] = defaultdict(set)
    for name, told in found:
        names[told].add(name)
    texts = [f"{name} ({told})" if told else name for told, group in names.items() for name in folded(group)]
    return ", ".join(sorted(texts))


def _other_counts(asked: Iterable[str], stored: Iterable[str]) -> list[_Told]:
    there, here = num_experts(stored), num_experts(asked)
    return [
        (layer, f"{there[layer]} in the checkpoint, {here[layer]} in the model")
        for layer in here
        if layer in there and there[layer] != here[layer]
    ]


def _not_tiled(asked: Mapping[str, Sequence[Rectangle]], stored: Mapping[str, StoredTensor]) -> list[_Told]:
    found = []
    for name, rectangles in asked.items():
        pair = overlapping_pair(rectangles)
        if pair:
            found.append((name, f"{rectangles[pair[0]]} and {rectangles[pair[1]]} overlap"))
        elif sum(rectangle.volume for rectangle in rectangles) != stored[name].num_elements:
            found.append((name, f"nobody fills {first_hole(stored[name].shape, rectangles)}"))
    return found
