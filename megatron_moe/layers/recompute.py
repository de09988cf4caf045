"""What a forward pass does not keep for the backward pass, but computes again there.

Draws are keyed, so that there is no generator to restore; whole functions run again, for collectives must pair up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


@dataclass(frozen=True)
class Recomputation:
    """Which layers of a stage, and which parts of the others.

    chunk: 0 = none; so many layers at a time keep their first input only.   first: only the first so many layers of a
    stage; None = all.   modules: names of --recompute-modules, in layers that do not run again as a whole.
    """

    chunk: int = 0
    first: int | None = None
    modules: frozenset[str] = field(default_factory=frozenset)

    def chunks(self, layers: list[str]) -> Iterator[tuple[list[str], bool]]:
        """A stage's layers in runs, and whether each runs again."""
        again = layers if self.first is None else layers[: self.first]
        if not self.chunk:
            again = []
        for start in range(0, len(again), self.chunk or 1):
            yield again[start : start + self.chunk], True
        for layer in layers[len(again) :]:
            yield [layer], False


def run_again(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), of which only the arguments are kept."""
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def remade(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, nobody keeps `tensor` for the backward pass: it is made again there, by `make` and without gradient."""
    address, elements = tensor.data_ptr(), tensor.numel()

    def pack(kept: Tensor) -> Any:
        if kept.data_ptr() == address and kept.numel() == elements and kept.is_contiguous():
            return kept.shape
        return kept

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return make().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
