"""Text that every machine with Python has: library sources to train on, and prose of another kind to be tried on."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_moe.data.batch import Batch, Stream
from megatron_moe.report.baselines import bigram_cross_entropy

VOCAB = 256  # bytes; 0 ends a document
SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Text:
    """Three runs of bytes: sources to learn, other sources to be tried on, and English documentation unlike both."""

    train: Bytes
    valid: Bytes
    unlike: Bytes

    @cached_property
    def fingerprint(self) -> str:
        """Tells apart the libraries of two Python versions."""
        digest = hashlib.sha256()
        for part in (self.train, self.valid, self.unlike):
            digest.update(hashlib.sha256(part.tobytes()).digest())
        return digest.hexdigest()[:12]

    def bigram(self, name: str) -> float:
        """Nats per byte of the bigram model of the training text on "valid" or "unlike"."""
        tokens = getattr(self, name).astype(np.int64)
        return bigram_cross_entropy(self.train.astype(np.int64), tokens, VOCAB)


def load_text() -> Text:
    """From the standard library of the running Python; its modules in an order that does not depend on the machine."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts)]
    names = {path: path.relative_to(root).as_posix() for path in files}
    # neighbours in a folder resemble each other: spread them
    files.sort(key=lambda path: hashlib.sha256(names[path].encode()).digest())
    held_out = max(1, len(files) // 10)
    prose = (root / "pydoc_data" / "topics.py").read_bytes()
    return Text(train=_join(files[held_out:]), valid=_join(files[:held_out]), unlike=_prose(prose))


def _join(files: Sequence[Path]) -> Bytes:
    return np.frombuffer(b"\0".join(path.read_bytes() for path in files), dtype=np.uint8)


def _prose(source: bytes) -> Bytes:
    """The documentation topics without the escapes of the Python strings that hold them."""
    return np.frombuffer(source.replace(b"\\n'", b"").replace(b"\\n", b"\n").replace(b"  ", b" "), dtype=np.uint8)


def windows(text: Bytes, starts: NDArray[np.int64], length: int, first_sample: int) -> Batch:
    """One sample of `length` bytes from each start."""
    rows = torch.from_numpy(np.stack([text[start : start + length + 1] for start in starts]).astype(np.int64))
    shape = (len(starts), length)
    stream = Stream(
        tokens=rows[:, :-1].contiguous(),
        labels=rows[:, 1:].contiguous(),
        loss_mask=torch.ones(shape),
        position_ids=torch.arange(length).repeat(len(starts), 1),
        segments=torch.zeros(shape, dtype=torch.int32),
    )
    return Batch({"decoder": stream}, torch.arange(first_sample, first_sample + len(starts)))


def training_batch(text: Text, *, seed: int, step: int, samples: int, length: int) -> Batch:
    """The batch of one step: the same for every model with this seed."""
    starts = np.random.default_rng([seed, step]).integers(0, len(text.train) - length - 1, samples)
    return windows(text.train, starts, length, step * samples)


def trial_batches(text: Bytes, *, samples: int, length: int, batches: int) -> list[Batch]:
    """Windows spread evenly over a text: the same for every model and seed."""
    starts = np.linspace(0, len(text) - length - 2, samples * batches).astype(np.int64)
    return [
        windows(text, starts[first : first + samples], length, first) for first in range(0, samples * batches, samples)
    ]
