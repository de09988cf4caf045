"""What stands in a loaded pickle for classes and functions that it names: objects that keep what they were given.

Nothing that a pickle names is imported or called. A name on the lists here gives a stand-in, any other is refused: the
lists are what Megatron's checkpoints hold beside tensors, numbers, texts, lists and dictionaries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# the settings, and what Megatron and its surroundings put beside them
CHECKPOINT_NAMES = (
    r"argparse\.Namespace",
    r"types\.SimpleNamespace",
    r"megatron\.[A-Za-z0-9_.]+",
    r"_io\.BytesIO",
    r"_codecs\.encode",
    r"signal\.Signals",
    r"pathlib\.(Pure)?PosixPath",
    r"numpy\.(ndarray|dtype)",
    r"numpy\.(core|_core)\.multiarray\.(_reconstruct|scalar)",
    r"numpy\.(core|_core)\.numeric\._frombuffer",
    r"numpy\.dtypes\.[A-Za-z0-9]+",
)
# what torch.distributed.checkpoint writes into .metadata
METADATA = r"torch\.distributed\.checkpoint\.metadata\."
METADATA_NAMES = (
    METADATA + r"(Metadata|MetadataIndex|TensorStorageMetadata|BytesStorageMetadata|ChunkStorageMetadata)",
    METADATA + r"(TensorProperties|StorageMeta|_MEM_FORMAT_ENCODING)",
    r"torch\.distributed\.checkpoint\.filesystem\.(_StorageInfo|_StoragePrefix)",
    # Megatron keeps the ranks' plans, to save faster
    r"torch\.distributed\.checkpoint\.planner\.(SavePlan|WriteItem|WriteItemType|TensorWriteData|BytesIOWriteData)",
    r"torch\.(float64|float32|float16|bfloat16|float8_e4m3fn|float8_e5m2|int64|int32|int16|int8|uint8|bool)",
    r"torch\.Size",
    r"torch\.serialization\._get_layout",
    r"collections\.OrderedDict",
    r"pathlib\.(Pure)?PosixPath",
    r"builtins\.(set|frozenset)",
    r"megatron\.[A-Za-z0-9_.]+",
)


class Inert:
    """Keeps arguments and state of what a pickle would have made. Each name has a subclass of its own."""

    full_name = ""

    def __new__(cls, *arguments: Any) -> Inert:
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = None
        made.items = {}
        return made

    def __init__(self, *arguments: Any) -> None:
        """Everything is done by __new__, which a pickle may call alone."""

    arguments: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """An ordered dictionary is filled after it is made."""
        self.items[key] = value

    def fields(self) -> dict[str, Any]:
        """What an object with attributes was given."""
        return dict(self.state) if isinstance(self.state, dict) else {}


def stand_in(full_name: str) -> type[Inert]:
    """A class that stands for the name."""
    return type("Inert", (Inert,), {"full_name": full_name})


def is_known(full_name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name is on a list."""
    return any(re.fullmatch(pattern, full_name) for pattern in patterns)


def plain(value: Any, depth: int = 0) -> Any:
    """The value as JSON can hold it: stand-ins by their name, what is neither number nor text by its kind."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth > 20:
        return "nested too deeply"
    if isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, Inert):
        return {"class": value.full_name, "arguments": plain(list(value.arguments), depth + 1)}
    return f"{type(value).__module__}.{type(value).__qualname__} {value}"[:200]
