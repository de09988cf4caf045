"""Work that any rank may fail in alone: then all ranks stop with the same error, and none waits for another."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_moe.checkpoint.messages import gather_to_all
from megatron_moe.config.errors import MegatronMoEError, StorageError
from megatron_moe.parallel.state import Axis


@contextmanager
def together(world: Axis, device: torch.device) -> Iterator[None]:
    """What the block raises on one rank, every rank raises at its end. Collective there; nothing inside may be.

    Holds for what a person can act on: MegatronMoEError, and OSError, which becomes a StorageError.
    """
    mine: tuple[str, str] | None = None
    try:
        yield
    except MegatronMoEError as error:
        mine = type(error).__name__, str(error)
    except OSError as error:
        mine = StorageError.__name__, f"{error}; free some room, or name a place that every rank can use."
    told = gather_to_all(json.dumps(mine) if mine else "", world, device)
    failed = [rank for rank, text in enumerate(told) if text]
    if failed:
        first = told[failed[0]]
        kind, text = json.loads(first)
        same = [rank for rank in failed if told[rank] == first]
        kinds = {error.__name__: error for error in MegatronMoEError.__subclasses__()}
        raise kinds[kind](text if len(same) == world.size else f"rank {same[0]}: {text}")
