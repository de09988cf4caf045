"""The linear program of expert choice with a cap on the experts of a token, made smooth by an entropy.

Source: arXiv:2202.09368, section 3.3: max over A of <S, A> + lambda · H(A), where 0 <= A <= 1, each expert's row sums
to k and each token's column to at most b, H(A) = -Σ A ln A. The paper finds it by Dykstra's projections onto the three
sets in turn. This project ascends the dual instead, which has the same optimum and does not stall when lambda is small
beside the scores:

    A[e, t] = min(1, exp((S[e, t] + a[e] + u[t]) / lambda)),   u <= 0

a of all experts is found for given u, then u of all tokens for given a, each exactly (see _level), and so on in turn.
The result is S + a + u: lambda · ln A before the bound at 1, which orders tokens within a row as A does and does not
underflow.
"""

import math

import torch
from torch import Tensor

_STILL = 1e-3  # of lambda: a price that moves less stands still


def capped_wishes(
    scores: Tensor, is_token: Tensor, takes: Tensor, cap: Tensor, *, most: int, entropy: float, iterations: int
) -> Tensor:
    """(G, E, T): S + a + u, -inf where there is no token.

    scores: (G, E, T) wide, finite.   is_token: (G, T) bool.   takes: (G,) int64 k, at most the group's tokens.
    cap: (G,) int64 b with E · k <= b · tokens.   most: the largest k, known on the host.   entropy: lambda.
    iterations: sweeps at most; fewer when no price moves.
    """
    experts = scores.shape[1]
    wishes = (scores / entropy).masked_fill(~is_token[:, None], float("-inf"))
    row_limit, column_limit = takes[:, None].expand(-1, experts), cap[:, None].expand_as(is_token)
    widest = int(cap.max()) if len(cap) else 0
    token_price = torch.zeros_like(wishes[:, 0])
    last_expert_price, last_token_price = torch.zeros_like(wishes[..., 0]), token_price
    moves = torch.ones_like(takes, dtype=torch.bool)
    for _ in range(iterations):
        expert_price = _level(wishes + token_price[:, None], row_limit, most, dim=2)
        # what every token would be worth at these prices
        offers = (wishes + expert_price[..., None]).masked_fill_(~is_token[:, None], 0.0)
        found = _level(offers, column_limit, widest, dim=1).clamp(max=0.0)
        # a group that is done stays as it is, whatever the others of its microbatch need
        last_expert_price = expert_price.where(moves[:, None], last_expert_price)
        last_token_price = found.where(moves[:, None], last_token_price)
        moves = moves & ((found - token_price).abs() > _STILL).any(dim=1)
        token_price = found
        if not bool(moves.any()):
            break
    priced = wishes + last_expert_price[..., None] + last_token_price[:, None]
    return priced * entropy


def _level(values: Tensor, total: Tensor, most: int, *, dim: int) -> Tensor:
    """(G, R): the x at which Σ_j min(1, exp(values[j] + x)) = total; inf if it is always less, 0 for a total of 0.

    values: (G, R, N), or (G, N, R) with dim=1; overwritten.   total: (G, R) int64, at most `most`.  The sum is the
    least over m of m + Σ exp of all but the m largest, so x is the largest over m < total of
    ln(total - m) - ln Σ exp(all but the m largest): no search is needed.
    """
    most = min(max(most - 1, 0), values.shape[dim])
    top = values.topk(most, dim=dim)
    rest = _log_sum(values.scatter_(dim, top.indices, float("-inf")), dim)
    # all but the m largest, for m = most, most - 1, ..., 0
    smallest_first = torch.cat([rest.unsqueeze(2), top.values.movedim(dim, 2).flip(2)], dim=2)
    tails = smallest_first.logcumsumexp(dim=2).flip(2)
    short = total[..., None] - torch.arange(most + 1, device=values.device)
    levels = (short.to(values.dtype).log() - tails).masked_fill(short <= 0, float("-inf"))
    return levels.amax(dim=2).masked_fill(total == 0, 0.0)


def _log_sum(values: Tensor, dim: int) -> Tensor:
    """ln Σ exp along dim, which goes; overwrites values.

    As logsumexp, but each term counts as at least the root of the smallest normal number: beside the largest, which
    counts as 1, that vanishes, and an exp that underflows would take ten times as long.
    """
    limits = torch.finfo(values.dtype)
    largest = values.amax(dim=dim, keepdim=True)
    values.sub_(largest.clamp(min=limits.min)).clamp_(min=0.5 * math.log(limits.tiny)).exp_()
    return values.sum(dim=dim).log() + largest.squeeze(dim)


def within_cap(wishes: Tensor, taken: Tensor, takes: Tensor, cap: Tensor) -> Tensor:
    """(G, E, T) bool: a choice near `taken` in which no token is over its cap and every expert has k tokens.

    wishes: (G, E, T), what to keep and to refill by.   taken: (G, E, T) bool, k in each row.   takes, cap: as above.
    A token keeps what wishes most for it. Then, place by place, the expert with the fewest tokens takes the free token
    that it wishes most; if it has all free ones already, another expert takes the free one and gives one in exchange.
    Such an exchange exists: the other has at least as many tokens, and lacks one that this expert has.
    """
    kept = wishes.masked_fill(~taken, float("-inf"))
    place = kept.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    taken = taken & (place < cap[:, None, None])
    table = _Places(wishes, taken, takes, cap)
    missing = (takes[:, None] - taken.sum(dim=2)).sum(dim=1)
    for _ in range(int(missing.max()) if missing.numel() else 0):
        table.fill_one()
    return table.taken


class _Places:
    """Who has which token, with what makes one place more cost a row of the table and not the whole of it.

    A group that lacks no token goes on counting, without effect on its choice.
    """

    def __init__(self, wishes: Tensor, taken: Tensor, takes: Tensor, cap: Tensor) -> None:
        self.wishes, self.taken, self.takes = wishes, taken, takes
        self.group = torch.arange(len(wishes), device=wishes.device)
        self.count = taken.sum(dim=2)  # (G, E): tokens of each expert
        # (G, T): how many experts more a token may have
        self.left = (cap[:, None] - taken.sum(dim=1)).masked_fill(~wishes[:, 0].isfinite(), 0)
        # what an expert may take without an exchange, -inf for the rest
        self.open = wishes.masked_fill((self.left <= 0)[:, None] | taken, float("-inf"))

    def fill_one(self) -> None:
        """One more token for the expert with the fewest, in each group where that is less than k."""
        group = self.group
        fewest, poorest = self.count.min(dim=1)
        lacking = fewest < self.takes
        best, freed = self.open[group, poorest].max(dim=1)
        taker, stuck = poorest, lacking & best.isneginf()
        if bool(stuck.any()):
            other, given, exchanged = self._exchange(poorest)
            self.taken[group, poorest, given] |= stuck
            self.taken[group, other, given] &= ~stuck
            taker, freed = other.where(stuck, poorest), exchanged.where(stuck, freed)
        self.taken[group, taker, freed] |= lacking
        self.count[group, poorest] += 1
        self.left[group, freed] -= 1
        # what an expert gives or gets in an exchange had no place left: it was not open
        self.open[group, taker, freed] = float("-inf")
        full = self.left[group, freed] <= 0
        self.open[group, :, freed] = self.open[group, :, freed].masked_fill(full[:, None], float("-inf"))

    def _exchange(self, poorest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(G,) each: another expert, the token that it gives to the poorest, and the free one that it takes instead."""
        wish, own = self.wishes[self.group, poorest], self.taken[self.group, poorest]
        freed = wish.masked_fill(self.left <= 0, float("-inf")).argmax(dim=1)
        # what the other expert gains by the free token is the same for all it might give
        gain = wish[:, None] - self.wishes + self.wishes[self.group, :, freed][..., None]
        possible = self.taken & ~own[:, None] & ~self.taken[self.group, :, freed][..., None]
        best = gain.masked_fill(~possible, float("-inf")).flatten(1).argmax(dim=1)
        tokens = self.wishes.shape[2]
        return best // tokens, best % tokens, freed
