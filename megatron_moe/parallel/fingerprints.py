"""What a rank says of a collective before it takes part, and what is wrong when the ranks of an axis disagree.

    rank 0   tp  all_reduce sum of float32 (16, 8)   layers/loss.py:21 < models/gpt.py:190
    rank 1   tp  all_reduce sum of float32 (16, 8)   layers/loss.py:21 < models/gpt.py:190
    rank 2   tp  all_gather of float32 (*, 8)        moe/capacity.py:156 < moe/layer.py:88      <- the culprit
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

ROOM = Path(__file__).parent
PACKAGE = ROOM.parent
# between whoever wants a collective and the check: of no interest to anybody
PLUMBING = {str(ROOM / f"{name}.py") for name in ("checked", "communicator", "wrapped", "turns", "through_host")}
# of what is said, so many bytes are compared
TEXT_BYTES = 1024


@dataclass(frozen=True)
class Call:
    """One rank's call. All ranks of the axis must agree in `axis`, `what` and `site`, and in `rows` if there are any.

    gives[r], takes[r]: what it sends to rank r of the axis, and expects from it, in a unit of the call.
    problem: what it says against itself.
    """

    axis: str
    what: str
    site: str
    problem: str = ""
    rows: tuple[int, ...] = ()
    gives: tuple[int, ...] = ()
    takes: tuple[int, ...] = ()

    def encode(self, size: int) -> Tensor:
        """(TEXT_BYTES + 24 · size,) uint8, for an axis of `size` ranks."""
        words = asdict(self) | {"rows": len(self.rows), "gives": len(self.gives), "takes": len(self.takes)}
        while len(text := json.dumps(words).encode()) > TEXT_BYTES:
            words |= {"site": words["site"][: len(words["site"]) // 2], "what": words["what"][:300]}
        counts = [*self.rows, *self.gives, *self.takes]
        numbers = torch.tensor(counts + [0] * (3 * size - len(counts)), dtype=torch.int64)
        letters = torch.frombuffer(bytearray(text.ljust(TEXT_BYTES)), dtype=torch.uint8)
        return torch.cat([letters, numbers.view(torch.uint8)])

    @classmethod
    def decode(cls, said: Tensor) -> "Call":
        words = json.loads(said[:TEXT_BYTES].numpy().tobytes())
        numbers = iter(said[TEXT_BYTES:].clone().view(torch.int64).tolist())
        counts = {name: tuple(next(numbers) for _ in range(words[name])) for name in ("rows", "gives", "takes")}
        return cls(**(words | counts))

    @property
    def key(self) -> tuple[object, ...]:
        """What all must agree in."""
        return self.axis, self.what, self.site, self.rows

    def __str__(self) -> str:
        rows = f", rows {list(self.rows)}" if self.rows else ""
        exchanged = f", sends {list(self.gives)}, expects {list(self.takes)}" if self.gives else ""
        against = f" ({self.problem})" if self.problem else ""
        return f"{self.axis}: {self.what}{rows}{exchanged}{against} at {self.site}"


def of_tensor(tensor: Tensor, *, any_rows: bool = False) -> str:
    """ "float32 (16, 8)", or "float32 (*, 8)" where ranks may bring different numbers of rows."""
    shape = ["*" if any_rows and dim == 0 else str(size) for dim, size in enumerate(tensor.shape)]
    return f"{str(tensor.dtype).removeprefix('torch.')} ({', '.join(shape)})"


def call_site() -> str:
    """Where in the package, or in a program that uses it, a collective is asked for: innermost line first.

    Lines of parallel/ are told with those that called them; libraries are passed over.
    """
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name not in PLUMBING and name != __file__ and "site-packages" not in name:
            path = Path(name)
            found.append(f"{path.relative_to(PACKAGE) if PACKAGE in path.parents else path.name}:{frame.f_lineno}")
            if path.parent != ROOM:
                break
        frame = frame.f_back
    return " < ".join(found)


def disagreement(calls: Sequence[Call], ranks: Sequence[int]) -> str:
    """What is wrong with the calls of an axis that meet each other, and whose fault it is; "" when they fit.

    ranks: their numbers in the world.
    """
    culprits, why = _culprits(calls)
    if not culprits:
        return ""
    told = [f"rank {rank}: {call}" for rank, call in zip(ranks, calls, strict=True)]
    named = [ranks[place] for place in culprits]
    return f"ranks {named} are out of step: {why}.\n" + "\n".join(told)


def _culprits(calls: Sequence[Call]) -> tuple[list[int], str]:
    """Places on the axis, and the reason."""
    against = [place for place, call in enumerate(calls) if call.problem]
    if against:
        return against, "what they call contradicts itself"
    parties: dict[tuple[object, ...], list[int]] = {}
    for place, call in enumerate(calls):
        parties.setdefault(call.key, []).append(place)
    if len(parties) > 1:
        return _minority(list(parties.values())), _difference(calls)
    pairs = [
        (giver, taker)
        for giver, call in enumerate(calls)
        for taker, other in enumerate(calls)
        if call.gives and call.gives[taker] != other.takes[giver]
    ]
    return _most_involved(pairs), "what one sends is not what the other expects"


def _minority(parties: list[list[int]]) -> list[int]:
    first, *others = sorted(parties, key=len, reverse=True)
    wrong = others if len(first) > len(others[0]) else [first, *others]
    return sorted(place for party in wrong for place in party)


def _difference(calls: Sequence[Call]) -> str:
    """What kind of mistake it looks like."""
    names = {call.site for call in calls}
    if len(names) > 1 or len({call.axis for call in calls}) > 1:
        return "they are elsewhere in the program (a call was left out, made once too often, or in another order)"
    return "they are at the same place in the program with another tensor, operation or number of rows"


def _most_involved(pairs: list[tuple[int, int]]) -> list[int]:
    """Who takes part in all of the pairs; both ends of a single pair."""
    everyone = sorted({place for pair in pairs for place in pair})
    return [place for place in everyone if all(place in pair for pair in pairs)] or everyone


