"""The two loaders of a process that opens pickles: each knows a list of names and refuses every other by name.

`.metadata` of torch.distributed.checkpoint is a bare pickle; files of torch.save go through torch.load with
weights_only=True, whose loader is told the names beforehand. Both make stand-ins only (see inert.py).
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_moe.convert.megatron.inert import CHECKPOINT_NAMES, METADATA_NAMES, Inert, is_known, stand_in
from megatron_moe.convert.megatron.isolation import Forbidden


class Refused(Exception):
    """A pickle is broken, or holds what no checkpoint of Megatron has to hold."""


class MetadataUnpickler(pickle.Unpickler):
    """Admits the dataclasses of torch.distributed.checkpoint.metadata and a few plain names, all as stand-ins."""

    def find_class(self, module: str, name: str) -> type[Inert]:
        """The stand-in of a name; Refused if it is not on the list."""
        full_name = f"{module}.{name}"
        if not is_known(full_name, METADATA_NAMES):
            raise Refused(f".metadata names {full_name}, which no such file has to; it is not called, and not read")
        return stand_in(full_name)


def load_metadata(path: Path) -> Inert:
    """The stand-in of the Metadata object."""
    try:
        with path.open("rb") as file:
            found = MetadataUnpickler(file).load()
    except (Refused, Forbidden):
        raise
    except Exception as error:  # broken bytes can raise any
        raise Refused(f"{path} cannot be read ({error})") from error
    if not isinstance(found, Inert) or not found.full_name.endswith(".Metadata"):
        raise Refused(f"{path} holds no Metadata of torch.distributed.checkpoint")
    return found


def load_file(path: Path) -> Any:
    """What torch.save wrote; tensors are mapped, not read. Other objects are stand-ins."""
    try:
        if not zipfile.is_zipfile(path):
            raise Refused(f"{path} is no file of torch.save since version 1.6; save it again with a current one")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        with torch.serialization.safe_globals(_stand_ins(names, str(path))):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (Refused, Forbidden):
        raise
    except Exception as error:  # broken bytes can raise any
        raise Refused(f"{path} cannot be read ({str(error).strip()[:300]})") from error


def load_tensor(data: bytes, told: str) -> torch.Tensor:
    """One tensor that torch.save wrote; told: what it is, for errors."""
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Forbidden:
        raise
    except Exception as error:  # broken bytes can raise any
        raise Refused(f"{told} cannot be read ({str(error).strip()[:300]})") from error
    if not isinstance(found, torch.Tensor):
        raise Refused(f"{told} is a {type(found).__name__}, expected a tensor")
    return found.detach()


def _stand_ins(names: list[str], told: str) -> list[Any]:
    unknown = sorted(name for name in names if not is_known(name, CHECKPOINT_NAMES))
    if unknown:
        raise Refused(f"{told} names {', '.join(unknown[:5])}, which no checkpoint has to; it is not called or read")
    return [(stand_in(name), name) for name in names]
