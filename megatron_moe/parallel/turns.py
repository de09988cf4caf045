"""Two pieces of work that take turns: while the one waits for what travels between ranks, the other computes.

Each runs on a thread of its own and only one runs at a time, so that the order of all that they do, their collectives
too, is the same on every rank: a piece gives way exactly where it waits for an axis that was made `yielding`. What has
not arrived when its turn comes again is waited for with work that needs nobody, as long as there is some.
"""

import threading
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.communicator import Communicator
from megatron_moe.parallel.state import Axis
from megatron_moe.parallel.wrapped import Wrapped

Work = Callable[[], None]
Filler = Callable[[], bool]  # does a piece of work, alone; False: there was none


def no_filler() -> bool:
    """There is no work to fill a wait with."""
    return False


class _AbandonedError(Exception):
    """Ends a piece of work whose companion failed."""


class Turns:
    """Runs two pieces of work, turn by turn; outside of `together` giving way does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._changed = threading.Condition()
        self._turn: int | None = None  # 0 or 1: whose; None: nobody shares
        self._over = [True, True]
        self._failures: list[BaseException] = []
        self._filler: Filler = no_filler

    def alone(self, work: Work, *, filler: Filler) -> None:
        """One piece, whose waiting is filled."""
        self._filler = filler
        try:
            work()
        finally:
            self._filler = no_filler

    def together(self, first: Work, second: Work, *, filler: Filler = no_filler) -> None:
        """Both, from beginning to end; `first` begins. Returns when both are over.

        Raises what one of them raised; the other is ended where it waits.
        """
        self._turn, self._over, self._failures = 0, [False, False], []
        self.alone(lambda: self._both(first, second), filler=filler)
        if self._failures:
            raise self._failures[0]

    def _both(self, first: Work, second: Work) -> None:
        thread = threading.Thread(target=self._play, args=(1, second), name="second-turn", daemon=True)
        thread.start()
        self._play(0, first)
        thread.join()
        self._turn = None

    def give_way(self) -> None:
        """Let the other go on, until it waits itself or is over."""
        mine = self._turn
        if mine is None or self._over[1 - mine]:
            return
        self._hand_over(1 - mine)
        self._await_turn(mine)

    def fill(self) -> bool:
        """Do a piece of work that waits for nobody; False: there is none."""
        return self._filler()

    def _play(self, number: int, work: Work) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has its own
        try:
            self._await_turn(number)
            work()
        except _AbandonedError:
            pass
        except BaseException as error:  # also of KeyboardInterrupt the other has to be told
            self._failures.append(error)
        finally:
            with self._changed:
                self._over[number] = True
                self._turn = 1 - number
                self._changed.notify_all()

    def _hand_over(self, other: int) -> None:
        with self._changed:
            self._turn = other
            self._changed.notify_all()

    def _await_turn(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == number)
        if self._failures:
            raise _AbandonedError


class _YieldingArrival(Arrival):
    def __init__(self, inner: Arrival, turns: Turns) -> None:
        self._inner = inner
        self._turns = turns

    def wait(self) -> Tensor:
        self._turns.give_way()
        while not self._inner.is_here() and self._turns.fill():
            pass
        return self._inner.wait()

    def is_here(self) -> bool:
        return self._inner.is_here()


class Yielding(Wrapped):
    """A communicator that gives way before it waits for a collective."""

    def __init__(self, inner: Communicator, turns: Turns) -> None:
        super().__init__(inner)
        self._turns = turns

    def arriving(self, arrival: Arrival) -> Arrival:
        return _YieldingArrival(arrival, self._turns)


def yielding(axis: Axis, turns: Turns) -> Axis:
    """The axis, of which a piece of work that waits for it gives way to the other."""
    return axis if axis.size == 1 else replace(axis, comm=Yielding(axis.comm, turns))
