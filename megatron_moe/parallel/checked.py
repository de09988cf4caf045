"""A communicator that compares what the ranks of its axis are about to do before they do it.

No rank begins a collective that does not fit, so that a mistake ends in a sentence and not in a hang, an abort or
wrong numbers. Slow: each call waits for all ranks of the axis. A message is compared by its two ends, when they wait
for it, and what is sent stays in memory until then.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from megatron_moe.config.errors import PeerError
from megatron_moe.parallel.arrival import Arrival
from megatron_moe.parallel.communicator import Communicator, Pending, Starting
from megatron_moe.parallel.fingerprints import Call, call_site, disagreement, of_tensor


class Store(Protocol):
    """Of torch.distributed's, what is used."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


@dataclass
class Board:
    """Where each rank of the world was last seen: its own last call, and how many of each kind it has made."""

    store: Store
    rank: int
    name: str  # of this board among others in the store
    counts: dict[str, int] = field(default_factory=dict)

    def note(self, kind: str, call: Call) -> int:
        """This rank makes a call; returns how many of this kind it has made with it."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.store.set(f"{self.name}/{self.rank}", json.dumps([self.counts, str(call)]))
        return self.counts[kind]

    def of(self, rank: int) -> tuple[dict[str, int], str]:
        """The same of another rank."""
        key = f"{self.name}/{rank}"
        if not self.store.check([key]):
            return {}, "nowhere yet"
        counts, said = json.loads(self.store.get(key))
        return counts, said


@dataclass(frozen=True)
class Channels:
    """Beside the axis' own: calls, or those of senders; and those of receivers. Both on the host, with a timeout."""

    calls: Communicator
    answers: Communicator
    board: Board
    timeout: timedelta


class Checked(Starting):
    """Does what `inner` does once all ranks of the axis are known to do the same.

    Raises PeerError, on all ranks that are concerned, when they do not, or when one does not come in time.
    """

    def __init__(self, inner: Communicator, channels: Channels, axis: str, ranks: tuple[int, ...], rank: int) -> None:
        """rank: this one's place among `ranks`, which are numbers in the world."""
        self.inner = inner
        self._channels = channels
        self._axis = axis
        self._ranks = ranks
        self._rank = rank

    def start_all_reduce_(self, tensor: Tensor, op: str = "sum") -> Arrival:
        self._agree(self._call(f"all_reduce {op} of {of_tensor(tensor)}"))
        return self.inner.start_all_reduce_(tensor, op)

    def start_all_gather(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        problem = self._wrong(tensor.shape[0], "rows given", rows[self._rank])
        self._agree(self._call(f"all_gather of {of_tensor(tensor, any_rows=True)}", problem, rows=tuple(rows)))
        return self.inner.start_all_gather(tensor, rows)

    def start_all_gather_(self, whole: Tensor, own: Tensor) -> Arrival:
        problem = self._wrong(whole.shape[0], "rows to fill", own.shape[0] * len(self._ranks))
        self._agree(self._call(f"all_gather into {of_tensor(whole)} of {of_tensor(own)}", problem))
        return self.inner.start_all_gather_(whole, own)

    def start_reduce_scatter(self, tensor: Tensor, rows: Sequence[int]) -> Arrival:
        problem = self._wrong(tensor.shape[0], "rows given", sum(rows))
        self._agree(self._call(f"reduce_scatter of {of_tensor(tensor)}", problem, rows=tuple(rows)))
        return self.inner.start_reduce_scatter(tensor, rows)

    def start_all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        problem = self._wrong(tensor.shape[0], "rows given", sum(send))
        what = f"all_to_all of {of_tensor(tensor, any_rows=True)}"
        self._agree(self._call(what, problem, gives=tuple(send), takes=tuple(receive)))
        return self.inner.start_all_to_all(tensor, send, receive)

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        self._agree(self._call(f"broadcast from rank {self._ranks[source]} of {of_tensor(tensor)}"))
        return self.inner.broadcast_(tensor, source)

    def barrier(self) -> None:
        self._agree(self._call("barrier"))
        self.inner.barrier()

    def send_receive_(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Pending:
        # on a ring all send and receive at once; a message counts as one more than its bytes, so that none is none
        gives, takes = [0] * len(self._ranks), [0] * len(self._ranks)
        gives[to], takes[source] = 1 + tensor.nbytes, 1 + received.nbytes
        what = f"send_receive of {str(tensor.dtype).removeprefix('torch.')}"
        self._agree(self._call(what, self._other_dtype(tensor, received), gives=tuple(gives), takes=tuple(takes)))
        return self.inner.send_receive_(tensor, to, received, source)

    def send(self, tensor: Tensor, to: int) -> Pending:
        meeting = self._meet(tensor, self._rank, to)
        return _Sent(meeting, self.inner.send(tensor, to))

    def receive_(self, tensor: Tensor, source: int) -> Pending:
        return _Received(self._meet(tensor, source, self._rank), self.inner, tensor, source)

    def _call(
        self,
        what: str,
        problem: str = "",
        *,
        rows: tuple[int, ...] = (),
        gives: tuple[int, ...] = (),
        takes: tuple[int, ...] = (),
    ) -> Call:
        return Call(self._axis, what, call_site(), problem, rows, gives, takes)

    @staticmethod
    def _wrong(found: int, what: str, announced: int) -> str:
        return "" if found == announced else f"{found} {what}, but {announced} announced"

    @staticmethod
    def _other_dtype(sent: Tensor, received: Tensor) -> str:
        return "" if sent.dtype == received.dtype else f"sends {sent.dtype}, but expects {received.dtype}"

    def _agree(self, call: Call) -> None:
        """Collective over the axis."""
        number = self._channels.board.note(self._axis, call)
        size = len(self._ranks)
        try:
            said = self._channels.calls.all_gather(call.encode(size)[None], [1] * size)
        except RuntimeError as error:
            raise PeerError(self._absent(call, number, self._axis, self._ranks, error)) from error
        found = disagreement([Call.decode(row) for row in said], self._ranks)
        if found:
            raise PeerError(f"collective {number} on axis {self._axis}: {found}")

    def _meet(self, tensor: Tensor, sender: int, receiver: int) -> "_Meeting":
        """Tell the other end of a message what this one thinks that it is, and be told."""
        sends = sender == self._rank
        call = self._call(f"message of {of_tensor(tensor)}")
        peer = receiver if sends else sender
        kind = f"{self._axis} from rank {self._ranks[sender]} to rank {self._ranks[receiver]}"
        number = self._channels.board.note(f"{kind}, {'sent' if sends else 'received'}", call)
        calls, answers = self._channels.calls, self._channels.answers
        out, back = (calls, answers) if sends else (answers, calls)
        said = call.encode(len(self._ranks))
        heard = torch.empty_like(said)
        sending = out.send(said, peer)
        return _Meeting(self, call, number, kind, sends, self._ranks[peer], sending, back.receive_(heard, peer), heard)

    def _absent(self, call: Call, number: int, kind: str, ranks: Sequence[int], error: RuntimeError) -> str:
        """Who of the ranks has not made the call of this number, and where they are instead."""
        seen = {rank: self._channels.board.of(rank) for rank in ranks}
        missing = [rank for rank, (counts, _) in seen.items() if counts.get(kind, 0) < number]
        seconds = self._channels.timeout.total_seconds()
        if not missing:
            reason = str(error).partition("\n")[0]
            return f"collective {number} on {kind} ({call}) broke off: {reason}. All ranks had come; one is gone."
        told = "; ".join(f"rank {rank} was last seen at {seen[rank][1]}" for rank in missing)
        late = f"ranks {missing} did not come within {seconds:g} s, or died"
        return f"collective {number} on {kind} ({call}): {late}. {told}"


@dataclass
class _Meeting:
    """The two ends of a message telling each other what it is."""

    owner: Checked
    call: Call
    number: int
    kind: str
    sends: bool
    peer: int  # in the world
    sending: Pending
    receiving: Pending
    heard: Tensor

    def conclude(self) -> None:
        """Raises PeerError when the other end means another message, or does not come."""
        try:
            self.receiving.wait()
            self.sending.wait()
        except RuntimeError as error:
            kind = f"{self.kind}, {'received' if self.sends else 'sent'}"
            raise PeerError(self.owner._absent(self.call, self.number, kind, [self.peer], error)) from error
        other = Call.decode(self.heard)
        if (other.axis, other.what) != (self.call.axis, self.call.what):
            ends = (self.call, other) if self.sends else (other, self.call)
            raise PeerError(
                f"message {self.number} on {self.kind}: the two ranks are out of step, or mean another tensor.\n"
                f"sent: {ends[0]}\nexpected: {ends[1]}"
            )

    def is_over(self) -> bool:
        return self.receiving.is_over() and self.sending.is_over()


class _Sent(Pending):
    def __init__(self, meeting: _Meeting, inner: Pending) -> None:
        self._meeting = meeting
        self._inner = inner

    def wait(self) -> None:
        self._meeting.conclude()
        self._inner.wait()

    def is_over(self) -> bool:
        return self._meeting.is_over() and self._inner.is_over()


class _Received(Pending):
    """Receives nothing before it is known to fit: gloo ends the process over a message that is too long."""

    def __init__(self, meeting: _Meeting, inner: Communicator, tensor: Tensor, source: int) -> None:
        self._meeting = meeting
        self._inner = inner
        self._tensor = tensor
        self._source = source

    def wait(self) -> None:
        self._meeting.conclude()
        self._inner.receive_(self._tensor, self._source).wait()

    def is_over(self) -> bool:
        return False
