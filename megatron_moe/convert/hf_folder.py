"""Reading a Hugging Face model folder: config.json and safetensors, in one file or in shards, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_moe.checkpoint.tensor_file import DTYPES
from megatron_moe.config.errors import CheckpointError, DataError
from megatron_moe.convert.tensors import Shape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# the index of the largest models has a few MB
JSON_LIMIT_BYTES = 100_000_000
FLOAT_WORDS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; DataError says what is wrong with the file."""
    try:
        with path.open("rb") as file:
            text = file.read(JSON_LIMIT_BYTES + 1)
        if len(text) > JSON_LIMIT_BYTES:
            raise DataError(f"{path} has more than {JSON_LIMIT_BYTES:,} bytes, which no model's has; look into it.")
        value = json.loads(text)
    except FileNotFoundError:
        raise DataError(f"there is no {path}; give the folder that `save_pretrained` wrote.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); copy the folder again.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not a {type(value).__name__}; copy the folder again.")
    return value


class HfFolder:
    """A TensorSource over the weights of a folder. Tensors are mapped, not loaded; shards may hold anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of = _locate(folder)
        self._check_index()

    def names(self) -> Sequence[str]:
        """Names on disk, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> Shape:
        """From the header of the shard."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """From the header of the shard; CheckpointError for types that no float weight has."""
        word = self._slice(name).get_dtype()
        if word not in FLOAT_WORDS:
            raise CheckpointError(
                f"{self.folder}: tensor {name} has the type {word}, but only {', '.join(FLOAT_WORDS)} can be imported; "
                f"a packed or quantised model has to be unpacked first."
            )
        return DTYPES[word]

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self._open(self._file_of[name]).get_tensor(name)  # type: ignore[no-any-return]

    def read_rows(self, name: str, index: int, start: int, stop: int) -> Tensor:
        """Rows start..stop of slice `index` along the first dimension; the rest is not read."""
        return self._slice(name)[index, start:stop]  # type: ignore[no-any-return]

    def _slice(self, name: str) -> Any:
        return self._open(self._file_of[name]).get_slice(name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.folder / file} cannot be read ({error}); copy it again, and compare sizes."
                ) from error
        return self._files[file]

    def _check_index(self) -> None:
        """What the index says is in a shard is there, and nothing else."""
        for file in sorted(set(self._file_of.values())):
            stored = set(self._open(file).keys())
            listed = {name for name, where in self._file_of.items() if where == file}
            for name in sorted(stored ^ listed):
                told = "is in it, but the index does not say so" if name in stored else "should be in it by the index"
                raise CheckpointError(f"{self.folder / file}: tensor {name} {told}; copy index and shards together.")


def _locate(folder: Path) -> dict[str, str]:
    """The file of each tensor, in the library's order of preference."""
    if not folder.is_dir():
        raise DataError(f"--hf-folder {folder}: there is no such folder; give the one that holds config.json.")
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_single_names(folder / SINGLE), SINGLE)
    if (folder / INDEX).is_file():
        table = read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise DataError(f"{folder / INDEX} has no weight_map; copy the folder again.")
        for name, file in table.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise DataError(f"{folder / INDEX}: {name} is said to be in {file!r}, which is no plain file name.")
        return table
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder} holds pickled weights (pytorch_model.bin), which can run code when opened: not read here; "
            f"load the model with transformers and save it again with save_pretrained, which writes safetensors."
        )
    raise DataError(f"{folder} has neither {SINGLE} nor {INDEX}; give the folder that `save_pretrained` wrote.")


def _single_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again.") from error
