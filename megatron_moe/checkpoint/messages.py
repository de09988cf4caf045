"""Text between ranks, so that they decide together: gathered to the first rank, told by it, or told by all."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_moe.config.errors import CheckpointError
from megatron_moe.parallel.collectives import gather_counts
from megatron_moe.parallel.state import Axis


def _encode(text: str, device: torch.device) -> Tensor:
    # frombuffer takes no empty buffer
    data = bytearray(text.encode() + b"\0")
    return torch.frombuffer(data, dtype=torch.uint8)[:-1].to(device)


def _decode(tensor: Tensor) -> str:
    return tensor.cpu().numpy().tobytes().decode()


def _cut(whole: Tensor, counts: Sequence[int]) -> list[str]:
    stops = list(accumulate(counts))
    return [_decode(whole[stop - count : stop]) for stop, count in zip(stops, counts, strict=True)]


def gather_to_first(text: str, axis: Axis, device: torch.device) -> list[str]:
    """What each rank says, in rank order, on the first rank; an empty list on the others. Collective."""
    mine = _encode(text, device)
    counts = gather_counts(len(mine), axis, device)
    send = [len(mine)] + [0] * (axis.size - 1)
    receive = counts if axis.is_first else [0] * axis.size
    whole = axis.comm.all_to_all(mine, send, receive)
    return _cut(whole, counts) if axis.is_first else []


def gather_to_all(text: str, axis: Axis, device: torch.device) -> list[str]:
    """What each rank says, in rank order, on every rank; nearly free when nobody says anything. Collective."""
    mine = _encode(text, device)
    counts = gather_counts(len(mine), axis, device)
    if not any(counts):
        return [""] * axis.size
    return _cut(axis.comm.all_gather(mine, counts), counts)


def told_by_first(text: str, axis: Axis, device: torch.device) -> str:
    """What the first rank says, on every rank; the others' argument is ignored. Collective."""
    count = torch.tensor([len(text.encode())], dtype=torch.int64, device=device)
    axis.comm.broadcast_(count, 0)
    length = int(count.item())
    if length == 0:
        return ""
    data = _encode(text, device) if axis.is_first else torch.empty(length, dtype=torch.uint8, device=device)
    return _decode(axis.comm.broadcast_(data, 0))


def any_says(mine: Sequence[bool], axis: Axis, device: torch.device) -> list[bool]:
    """For each place, whether any rank says yes. Collective; all ranks give as many."""
    flags = torch.tensor(mine, dtype=torch.int32, device=device)
    if len(flags):
        axis.comm.all_reduce_(flags, "max")
    return [bool(flag) for flag in flags.tolist()]


def all_ready(ready: bool, axis: Axis, device: torch.device) -> bool:
    """True when every rank says so. Collective."""
    flag = torch.tensor([int(ready)], dtype=torch.int64, device=device)
    return bool(axis.comm.all_reduce_(flag, "min").item())


def raise_together(
    problem: str, axis: Axis, device: torch.device, kind: type[CheckpointError] = CheckpointError
) -> None:
    """An error on every rank if any rank has a problem; an error on one rank alone would hang the others."""
    problems = gather_to_all(problem, axis, device)
    found = [f"rank {rank}: {text}" if axis.size > 1 else text for rank, text in enumerate(problems) if text]
    if found:
        more = f"\n... and {len(found) - 3} more ranks" if len(found) > 3 else ""
        raise kind("\n".join(found[:3]) + more)
