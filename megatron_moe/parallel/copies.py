"""Numbers that several ranks hold alike: which ones, along which axes, and whether they still are."""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from megatron_moe.parallel.bit_hash import bit_hash
from megatron_moe.parallel.blocks import Block, parameter_blocks, state_block
from megatron_moe.parallel.layout import layout_of
from megatron_moe.parallel.state import Axis, ParallelState

AXES = tuple(field.name for field in fields(ParallelState))


@dataclass(frozen=True)
class Copy:
    """A tensor of this rank, of which all ranks of each of the `axes` hold the same bits.

    blocks: its rectangles of logical tensors, as views.
    """

    name: str
    tensor: Tensor
    axes: tuple[str, ...]
    blocks: Callable[[], list[Block]]


def module_copies(modules: Iterable[nn.Module], state: ParallelState, but: Set[str] = frozenset()) -> list[Copy]:
    """All parameters and remembered states of this rank's stages.

    but: names of parameters that are left out, for the modules do not hold them whole.
    """
    found: dict[int, Copy] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            if name in but:
                continue
            layout = layout_of(parameter)
            axes = (*layout.replica_axes, layout.reduce_over)
            # two stages of one rank may share it
            found[id(parameter)] = Copy(name, parameter.data, axes, _parameter(name, parameter, state))
        for name, buffer in module.named_buffers():
            found[id(buffer)] = Copy(name, buffer, ("stage",), _buffer(name, buffer, state))
    return list(found.values())


def _parameter(name: str, parameter: nn.Parameter, state: ParallelState) -> Callable[[], list[Block]]:
    return lambda: parameter_blocks(name, parameter, state)


def _buffer(name: str, buffer: Tensor, state: ParallelState) -> Callable[[], list[Block]]:
    return lambda: [state_block(name, buffer, state)]


def with_others(copies: Iterable[Copy], state: ParallelState) -> list[Copy]:
    """Those that another rank holds too, in an order that all its holders share."""
    held = [copy for copy in copies if any(state.axis(name).size > 1 for name in copy.axes)]
    return sorted(held, key=lambda copy: copy.name)


def differing(copies: Sequence[Copy], state: ParallelState, device: torch.device) -> tuple[bool, list[str]]:
    """Whether any rank of the world found copies that differ, and the names of those that differ from this rank's.

    copies: as `with_others` gives them. Collective over the world: of each copy one hash is compared along each axis.
    """
    hashes = torch.stack([bit_hash(copy.tensor) for copy in copies]) if copies else _integers([], device)
    differs = torch.zeros(len(copies), dtype=torch.bool, device=device)
    for name in AXES:
        places = [place for place, copy in enumerate(copies) if name in copy.axes]
        if places and state.axis(name).size > 1:
            differs[places] |= _differ(hashes[places], state.axis(name))
    anywhere = state.world.comm.all_reduce_(differs.any().to(torch.int64), "max")
    if not int(anywhere):
        return False, []
    return True, [copy.name for copy, here in zip(copies, differs.tolist(), strict=True) if here]


def _differ(hashes: Tensor, axis: Axis) -> Tensor:
    """(n,) bool: where the ranks do not all have the same number."""
    # the inverse of an integer falls as it rises: of both the largest, and so the largest and the smallest
    highest = axis.comm.all_reduce_(torch.stack([hashes, ~hashes]), "max")
    return highest[0] != ~highest[1]


def _integers(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def dissent(hashes: dict[int, str]) -> str:
    """Which ranks differ, in words; "" when all hold the same. hashes: of the same numbers, by rank.

    What most ranks hold is taken for right; where there is no such majority, nobody is.
    """
    parties: dict[str, list[int]] = {}
    for rank, found in sorted(hashes.items()):
        parties.setdefault(found, []).append(rank)
    if len(parties) <= 1:
        return ""
    first, *others = sorted(parties.values(), key=len, reverse=True)
    if len(first) > len(others[0]):
        wrong = sorted(rank for party in others for rank in party)
        return f"ranks {wrong} differ from ranks {first}, which agree"
    told = " and ".join(f"ranks {party}" for party in sorted([first, *others]))
    return f"{told} differ, and no majority tells which of them are right"
