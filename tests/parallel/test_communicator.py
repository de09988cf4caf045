"""Gloo ranks, and ranks that only keep a record."""

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.parallel.communicator import Identity
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.recording import Recording, Tally
from megatron_moe.parallel.state import ParallelState


def recording(size: int = 4, rank: int = 1) -> tuple[Recording, Tally]:
    tally = Tally()
    return Recording(size, rank, tally), tally


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float32, device="meta")


def test_a_record_of_an_all_reduce_is_twice_the_tensor_less_the_own_part() -> None:
    comm, tally = recording()
    assert comm.all_reduce_(meta(8, 2)).shape == (8, 2)
    # ring: 3 steps of a quarter of 64 bytes, twice
    assert tally.calls == {"all_reduce": 1} and tally.sent_bytes == {"all_reduce": 96}


def test_a_record_of_a_gather() -> None:
    comm, tally = recording()
    assert comm.all_gather(meta(2, 5), [2, 2, 2, 2]).shape == (8, 5)
    assert tally.sent_bytes == {"all_gather": 3 * 40}  # the own 40 bytes to three others
    assert comm.all_gather(meta(0, 5), [2, 0, 1, 1]).shape == (4, 5)
    assert tally.calls == {"all_gather": 2}


def test_a_record_of_a_scatter_and_an_exchange_leaves_out_what_stays() -> None:
    comm, tally = recording()
    assert comm.reduce_scatter(meta(6, 5), [3, 2, 1, 0]).shape == (2, 5)
    assert tally.sent_bytes["reduce_scatter"] == 4 * 20  # four of six rows belong to others
    assert comm.all_to_all(meta(6, 5), [1, 2, 3, 0], [0, 2, 4, 1]).shape == (7, 5)
    assert tally.sent_bytes["all_to_all"] == 4 * 20
    assert comm.all_to_all(meta(0, 5), [0] * 4, [0] * 4).shape == (0, 5)


def test_a_record_of_the_rest() -> None:
    comm, tally = recording()
    tensor = meta(3)
    comm.broadcast_(tensor, 0)
    comm.broadcast_(tensor, 1)
    comm.send(tensor, 2).wait()
    comm.receive_(tensor, 0).wait()
    comm.send_receive_(tensor, 2, meta(2), 0).wait()
    comm.barrier()
    assert tally.calls == {"broadcast": 2, "send": 1, "receive": 1, "send_receive": 1, "barrier": 1}
    assert tally.sent_bytes == {"broadcast": 12, "send": 12, "receive": 0, "send_receive": 12, "barrier": 0}
    assert tensor.is_meta


def test_alone_everything_is_as_it_was() -> None:
    comm, tensor = Identity(), torch.arange(6.0).view(3, 2)
    assert comm.all_reduce_(tensor) is tensor
    assert comm.all_gather(tensor, [3]) is tensor
    assert comm.reduce_scatter(tensor, [3]) is tensor
    assert comm.all_to_all(tensor, [3], [3]) is tensor
    assert comm.broadcast_(tensor, 0) is tensor


def test_alone_there_is_nobody_to_send_to() -> None:
    comm, tensor = Identity(), torch.zeros(1)
    with pytest.raises(RuntimeError, match="nobody to send to"):
        comm.send(tensor, 0)
    with pytest.raises(RuntimeError, match="nobody to receive from"):
        comm.receive_(tensor, 0)
    with pytest.raises(RuntimeError, match="nobody to send to and to receive from"):
        comm.send_receive_(tensor, 0, tensor, 0)


def talk(rank: int, world_size: int) -> None:
    # an axis that is not the world: its ranks are 0 and 2, or 1 and 3
    state = ParallelState.distributed(Grid(world_size, pp=2))
    axis, partner = state.pp, 1 - state.pp.rank
    mine = torch.tensor([float(rank), -float(rank)])
    assert axis.comm.all_reduce_(mine.clone(), "max").tolist() == [max(axis.ranks), -min(axis.ranks)]
    assert axis.comm.all_reduce_(mine.clone(), "min").tolist() == [min(axis.ranks), -max(axis.ranks)]
    for source in (0, 1):
        assert axis.comm.broadcast_(mine.clone(), source)[0] == axis.ranks[source]
    received = torch.empty(3, 2)
    # every second number: not contiguous
    sending = axis.comm.send(torch.arange(12.0).view(3, 4)[:, ::2] + rank, partner)
    axis.comm.receive_(received, partner).wait()
    sending.wait()
    assert torch.equal(received, torch.arange(12.0).view(3, 4)[:, ::2] + axis.ranks[partner])
    axis.comm.barrier()


def start(rank: int, world_size: int) -> None:
    """What is started gives what the call that waits gives, in any order of waiting, and meanwhile the rest goes on."""
    comm = ParallelState.distributed(Grid(world_size)).world.comm
    rows, even = [3, 0, 1], [2] * world_size
    mine, whole = torch.arange(2.0 * rows[rank]).view(-1, 2) + rank, torch.arange(12.0).view(6, 2) * (rank + 1)
    share = torch.zeros(6, 2)
    share[2 * rank : 2 * rank + 2] = whole[2 * rank : 2 * rank + 2]
    flights = {
        "gather": comm.start_all_gather(mine, rows),
        "even gather": comm.start_all_gather(whole[:2], even),
        "scatter": comm.start_reduce_scatter(whole, even),
        "uneven scatter": comm.start_reduce_scatter(whole[:4], rows),
        "exchange": comm.start_all_to_all(whole, even, even),
        "reduce": comm.start_all_reduce_(whole.clone(), "max"),
        "gather in place": comm.start_all_gather_(share, share[2 * rank : 2 * rank + 2]),
    }
    found = {name: flights[name].wait() for name in reversed(flights)}
    # gloo does not tell of a scatter
    assert all(flight.is_here() for name, flight in flights.items() if "scatter" not in name)
    assert torch.equal(found["gather"], comm.all_gather(mine, rows)) and found["gather"].shape == (4, 2)
    assert torch.equal(found["even gather"], comm.all_gather(whole[:2], even))
    assert torch.equal(found["scatter"], torch.arange(12.0).view(6, 2)[2 * rank : 2 * rank + 2] * 6)
    assert torch.equal(found["uneven scatter"], comm.reduce_scatter(whole[:4], rows))
    assert torch.equal(found["exchange"], comm.all_to_all(whole, even, even))
    assert torch.equal(found["reduce"], torch.arange(12.0).view(6, 2) * world_size)
    scale = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])[:, None]
    assert found["gather in place"] is share and torch.equal(share, torch.arange(12.0).view(6, 2) * scale)


def test_what_is_started_arrives() -> None:
    run_on_ranks(3, start)


def test_what_needs_no_time_is_here_at_once() -> None:
    comm, whole = Identity(), torch.arange(4.0)
    assert comm.start_all_gather_(whole, whole).wait() is whole
    assert comm.start_all_to_all(whole, [4], [4]).is_here()
    record, tally = recording()
    assert record.start_all_gather_(meta(8, 5), meta(2, 5)).wait().shape == (8, 5)
    assert tally.sent_bytes == {"all_gather": 3 * 40}


def test_ranks_of_an_axis_talk_by_their_place_on_it() -> None:
    run_on_ranks(4, talk)


def turn(rank: int, world_size: int) -> None:
    # an axis that is not the world: its ranks are 0, 2 and 4, or 1, 3 and 5
    axis = ParallelState.distributed(Grid(world_size, pp=3)).pp
    after, before = (axis.rank + 1) % 3, (axis.rank - 1) % 3
    # more than a buffer takes: whoever sent first and received then would wait for ever
    mine = (torch.arange(2.0**22).view(-1, 2) + rank)[:, :1]
    received = torch.empty(2**21, 1)
    second = torch.empty(1)
    first = axis.comm.send_receive_(mine, after, received, before)
    then = axis.comm.send_receive_(torch.tensor([float(rank)]), after, second, before)
    then.wait()
    first.wait()
    assert torch.equal(received, mine - rank + axis.ranks[before])
    assert second.item() == axis.ranks[before]


def test_all_ranks_of_a_ring_send_and_receive_at_once() -> None:
    run_on_ranks(6, turn)


@pytest.mark.parametrize("rank", range(3))
def test_what_all_ranks_record_adds_up(rank: int) -> None:
    """Every row that is sent arrives: over all ranks, an exchange sends what its ranks receive from others."""
    counts = [[1, 2, 3], [0, 4, 1], [2, 2, 0]]
    comm, tally = recording(3, rank)
    receive = [row[rank] for row in counts]
    found = comm.all_to_all(meta(sum(counts[rank]), 1), counts[rank], receive)
    assert found.shape == (sum(receive), 1)
    assert tally.sent_bytes["all_to_all"] == 4 * (sum(counts[rank]) - counts[rank][rank])


def test_a_record_answers_as_if_the_others_brought_the_same() -> None:
    comm, _ = recording()
    mine = torch.tensor([1.0, 2.0])
    assert comm.all_gather(mine, [2, 2, 2, 2]).tolist() == [1.0, 2.0] * 4
    assert comm.all_gather(mine[:0], [2, 0, 1, 1]).tolist() == [0.0] * 4
    assert comm.all_to_all(mine, [1, 1, 0, 0], [2, 1, 0, 2]).tolist() == [1.0, 2.0, 1.0, 2.0, 1.0]
    assert comm.reduce_scatter(mine, [1, 1, 0, 0]).tolist() == [1.0]
    comm.receive_(mine, 0).wait()
    assert mine.tolist() == [0.0, 0.0]


def test_a_tally_knows_the_largest_call_and_forgets() -> None:
    comm, tally = recording()
    for size in (2, 6, 4):
        comm.send(meta(size), 2)
    tally.add("send", 10, times=3)
    assert tally.calls == {"send": 6} and tally.largest == {"send": 24} and tally.total_bytes == 4 * 12 + 30
    tally.forget()
    assert tally == Tally()
