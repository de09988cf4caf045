"""What a collective that was started gives back: a tensor that is still being filled."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


class Arrival(ABC):
    """A tensor under way."""

    @abstractmethod
    def wait(self) -> Tensor:
        """The whole tensor; to be called once."""


class Landed(Arrival):
    """One that needed no time."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


class Flying(Arrival):
    """A torch.distributed handle, what it reads and fills, and what is done with that once it is over."""

    def __init__(self, work: dist.Work, filled: Tensor, *read: Tensor, then: Callable[[Tensor], Tensor]) -> None:
        self._work = work
        self._filled = filled
        self._read = read  # kept alive
        self._then = then

    def wait(self) -> Tensor:
        self._work.wait()
        return self._then(self._filled)


class Joined(Arrival):
    """What `join` makes of other arrivals; it waits for them."""

    def __init__(self, join: Callable[[], Tensor]) -> None:
        self._join = join

    def wait(self) -> Tensor:
        return self._join()


def as_it_is(tensor: Tensor) -> Tensor:
    """Nothing is left to be done."""
    return tensor
