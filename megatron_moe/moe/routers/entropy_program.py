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
    priced, moves = wishes, torch.ones_like(takes, dtype=torch.bool)
    for _ in range(iterations):
        expert_price = _level(wishes + token_price[:, None], row_limit, most)
        # (G, T, E): what every token would be worth at these prices
        offers = (wishes + expert_price[..., None]).masked_fill(~is_token[:, None], 0.0).transpose(1, 2)
        found = _level(offers, column_limit, widest).clamp(max=0.0)
        # a group that is done stays as it is, whatever the others of its microbatch need
        priced = (wishes + expert_price[..., None] + found[:, None]).where(moves[:, None, None], priced)
        moves = moves & ((found - token_price).abs() > _STILL).any(dim=1)
        token_price = found
        if not bool(moves.any()):
            break
    return priced * entropy


def _level(values: Tensor, total: Tensor, most: int) -> Tensor:
    """(G, R): the x at which Σ_j min(1, exp(values[j] + x)) = total; inf if it is always less, 0 for a total of 0.

    values: (G, R, N).   total: (G, R) int64, at most `most`.  The sum is the least over m of m + Σ exp of all but the m
    largest, so x is the largest over m < total of ln(total - m) - ln Σ exp(all but the m largest): no search is needed.
    """
    most = min(most, values.shape[2])
    top = values.topk(most, dim=2)
    rest = values.scatter(2, top.indices, float("-inf")).logsumexp(dim=2, keepdim=True)
    # all but the m largest, for m = most, most - 1, ..., 0
    smallest_first = torch.cat([rest, top.values.flip(2)], dim=2)
    tails = smallest_first.logcumsumexp(dim=2).flip(2)
    short = total[..., None] - torch.arange(most + 1, device=values.device)
    levels = (short.to(values.dtype).log() - tails).masked_fill(short <= 0, float("-inf"))
    return levels.amax(dim=2).masked_fill(total == 0, 0.0)


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
    missing = (takes[:, None] - taken.sum(dim=2)).sum(dim=1)
    for _ in range(int(missing.max()) if missing.numel() else 0):
        taken = _one_more(wishes, taken, takes, cap)
    return taken


def _one_more(wishes: Tensor, taken: Tensor, takes: Tensor, cap: Tensor) -> Tensor:
    """`taken` with one more token for the expert with the fewest, in each group where that is less than k."""
    groups, experts, tokens = taken.shape
    group = torch.arange(groups, device=taken.device)
    count = taken.sum(dim=2)
    poorest = count.argmin(dim=1)
    lacking = count[group, poorest] < takes
    free = (taken.sum(dim=1) < cap[:, None]) & wishes[:, 0].isfinite()
    own = taken[group, poorest]
    wish = wishes[group, poorest]
    open_wish = wish.masked_fill(~free | own, float("-inf"))
    simple = open_wish.isfinite().any(dim=1)
    token = open_wish.argmax(dim=1)
    # the exchange: what the other expert gains by the free token is the same for all it might give
    freed = wish.masked_fill(~free, float("-inf")).argmax(dim=1)
    gain = wish[:, None] - wishes + wishes[group, :, freed][..., None]
    possible = taken & ~own[:, None] & ~taken[group, :, freed][..., None]
    best = gain.masked_fill(~possible, float("-inf")).flatten(1).argmax(dim=1)
    other, given = best // tokens, best % tokens
    taken = taken.clone()
    taken[group, poorest, torch.where(simple, token, given)] |= lacking
    swap = lacking & ~simple
    taken[group, other, freed] |= swap
    taken[group, other, given] &= ~swap
    return taken
