"""What goes through the host arrives as it would without."""

from collections.abc import Callable

import torch
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.parallel.communicator import Communicator
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState

CALLS: dict[str, Callable[[Communicator, Tensor, int], Tensor]] = {
    "all_reduce_": lambda comm, mine, rank: comm.all_reduce_(mine),
    "max": lambda comm, mine, rank: comm.all_reduce_(mine, "max"),
    "all_gather": lambda comm, mine, rank: comm.all_gather(mine[: rank + 1], [1, 2]),
    "reduce_scatter": lambda comm, mine, rank: comm.reduce_scatter(mine, [1, 3]),
    "all_to_all": lambda comm, mine, rank: comm.all_to_all(mine, [rank + 1, 3 - rank], [1, 2] if not rank else [3, 2]),
    "broadcast_": lambda comm, mine, rank: comm.broadcast_(mine, 1),
}


def _ask(rank: int, world_size: int, through_host: bool) -> list[list[float]]:
    comm = ParallelState.distributed(Grid(world_size), through_host=through_host).world.comm
    found = [call(comm, torch.arange(4.0) + 10.0 * rank, rank).tolist() for call in CALLS.values()]
    mine = torch.full((2,), float(rank))
    sending = comm.send(mine, 1 - rank)
    other = torch.empty(2)
    comm.receive_(other, 1 - rank).wait()
    sending.wait()
    comm.send_receive_(mine + 5.0, 1 - rank, mine, 1 - rank).wait()
    comm.barrier()
    return [*found, mine.tolist(), other.tolist()]


def test_all_collectives_give_the_same() -> None:
    answers = run_on_ranks(2, _ask, True)
    assert answers == run_on_ranks(2, _ask, False)
    assert answers[0][-2] == [6.0, 6.0]
    assert answers[0][0] == [10.0, 12.0, 14.0, 16.0] and answers[0][-1] == [1.0, 1.0]
