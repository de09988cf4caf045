"""What a collective that was started gives back: a tensor that is still being filled."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor


class Arrival(ABC):
    """A tensor under way."""

    @abstractmethod
    def wait(self) -> Tensor:
        """The whole tensor; to be called once."""

    @abstractmethod
    def is_here(self) -> bool:
        """Whether waiting would take no time, as far as the host knows."""


class Landed(Arrival):
    """One that needed no time."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor

    def is_here(self) -> bool:
        return True


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

    def is_here(self) -> bool:
        return bool(self._work.is_completed())


class Joined(Arrival):
    """What `join` makes of the tensors of other arrivals."""

    def __init__(self, arrivals: Sequence[Arrival], join: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self._arrivals = arrivals
        self._join = join

    def wait(self) -> Tensor:
        return self._join([arrival.wait() for arrival in self._arrivals])

    def is_here(self) -> bool:
        return all(arrival.is_here() for arrival in self._arrivals)


def as_it_is(tensor: Tensor) -> Tensor:
    """Nothing is left to be done."""
    return tensor
