"""Names of logical tensors: which are experts of which layer, which numbers are missing, long lists made short."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

_EXPERT = re.compile(r"(.+\.experts)\.([0-9]+)\.(.+)")
_NUMBER = re.compile(r"(?<=\.)([0-9]+)(?=\.|$)")


@dataclass(frozen=True)
class ExpertName:
    """layers.3.mlp.experts.5.w1 is weight w1 of number 5 of layer layers.3.mlp.experts."""

    layer: str
    number: int
    weight: str


def expert_name(name: str) -> ExpertName | None:
    """None for a tensor that belongs to no expert."""
    match = _EXPERT.fullmatch(name)
    return ExpertName(match[1], int(match[2]), match[3]) if match else None


def expert_numbers(names: Iterable[str]) -> dict[str, dict[str, set[int]]]:
    """found[layer][weight] = the numbers of the experts that have it."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        expert = expert_name(name)
        if expert:
            found[expert.layer][expert.weight].add(expert.number)
    return found


def num_experts(names: Iterable[str]) -> dict[str, int]:
    """How many experts each layer has, the last one counted by its number."""
    return {layer: max(map(max, weights.values())) + 1 for layer, weights in expert_numbers(names).items()}


def absent_experts(names: Iterable[str]) -> list[str]:
    """Tensors that the other experts of their layer have and that nobody wrote: a wrong gather, a wrong converter."""
    absent = []
    for layer, weights in expert_numbers(names).items():
        count = max(map(max, weights.values())) + 1
        for weight, numbers in weights.items():
            absent += [f"{layer}.{number}.{weight}" for number in range(count) if number not in numbers]
    return absent


def folded(names: Iterable[str]) -> list[str]:
    """All of the names in few words: layers.0.w, layers.1.w and layers.2.w are layers.{0-2}.w."""
    split = {tuple(_NUMBER.split(name)) for name in names}
    for slot in range(max(map(len, split), default=0) - 1, 0, -1):
        if slot % 2 == 0:
            continue
        groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
        short = {words for words in split if len(words) <= slot}
        for words in split - short:
            groups[words[:slot] + ("",) + words[slot + 1 :]].append(int(words[slot]))
        split = short | {key[:slot] + (_ranges(numbers),) + key[slot + 1 :] for key, numbers in groups.items()}
    return sorted("".join(words) for words in split)


def _ranges(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    starts = [number for number in ordered if number - 1 not in ordered]
    stops = [number for number in ordered if number + 1 not in ordered]
    words = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True)]
    return words[0] if len(ordered) == 1 else "{" + ",".join(words) + "}"
