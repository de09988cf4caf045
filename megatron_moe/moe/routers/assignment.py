"""Balanced assignment: each token to one expert, the experts' loads equal, and the sum of scores as large as possible.

It is a transportation problem of many rows (tokens) and few columns (experts), solved exactly by its dual. Experts have
prices; a token belongs where score minus price is largest. As long as every token sits at such an expert, the first
assignment with the right loads is the best one. So:

1. Prices to begin with: a few damped Newton steps on the dual, its maximum made smooth by a temperature that falls.
2. Every token goes to its best expert. Some experts now have too many tokens, some too few.
3. Rounds: for each pair of experts, what the cheapest token to move between them would lose; shortest paths from the
   experts with too many over these losses; prices follow the distances, which makes every step of a shortest path free;
   tokens move along paths that do not meet. Each round brings at least one token from too many to too few.

Scores count as multiples of 2^-40 of their spread, held as whole numbers in float64: sums and differences are exact, so
no rounding error grows over the rounds. The total is below the best one by at most T · 2^-40 of the spread. All groups
are solved at once, in tensors, without a random number; a round waits for the device.

Where loads of T/E are no whole number they are its floor or ceil, whichever experts that suits: each expert has
floor + 1 places, of which a blank row (one for each expert, all its scores 0) fills one unless it sits in an extra
column X with T mod E places. N = T + E rows and M = E + 1 columns below.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_NEVER = float("inf")
_RESOLUTION = 2.0**40
# of the spread of scores: temperatures of the smooth dual, two steps at each
_TEMPERATURES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5)
_MAX_ROUNDS = 1000


def balanced_assignment(scores: Tensor, is_token: Tensor, *, max_rounds: int = _MAX_ROUNDS) -> Tensor:
    """(G, T) int64: the expert of each token, E where there is none; loads of a group differ by at most one.

    scores: (G, T, E); what is not finite counts as the group's smallest finite score.   is_token: (G, T) bool.
    max_rounds: after so many (no input met so far needs half of the default) the tokens that are too many go to the
    free places in order of their index: still balanced, no longer the best.
    """
    groups, tokens, experts = scores.shape
    if not scores.numel():
        return is_token.new_zeros(groups, tokens, dtype=torch.int64)
    table = _whole_numbers(scores, is_token)
    count = is_token.sum(dim=1)
    flow = _begin(table, is_token, count)
    rounds = 0
    while bool((flow.load > flow.places).any()):
        if rounds == max_rounds:
            return _filled(flow.column[:, :tokens], is_token, count, experts)
        flow = _next_round(flow)
        rounds += 1
    return flow.column[:, :tokens].masked_fill(~is_token, experts)


@dataclass(frozen=True)
class _Flow:
    """Where every row sits; each sits where score minus price is largest."""

    scores: Tensor  # (G, N, M) whole numbers; -inf where a blank row cannot go
    exists: Tensor  # (G, N) bool: False for padding
    places: Tensor  # (G, M) int64
    price: Tensor  # (G, M) whole numbers
    column: Tensor  # (G, N) int64

    @property
    def load(self) -> Tensor:
        """(G, M) int64: rows in each column."""
        return _loads(self.column, self.exists, self.places.shape[1])


def _loads(column: Tensor, exists: Tensor, columns: int) -> Tensor:
    zeros = torch.zeros(column.shape[0], columns, dtype=torch.int64, device=column.device)
    return zeros.scatter_add_(1, column, exists.to(torch.int64))


def _whole_numbers(scores: Tensor, is_token: Tensor) -> Tensor:
    """(G, T, E) float64: 0 for the group's smallest finite score to 2^40 for its largest; 0 for padding."""
    scores = scores.to(torch.float64)
    known = scores.isfinite() & is_token[..., None]
    least = scores.where(known, _NEVER).amin(dim=(1, 2), keepdim=True)
    spread = scores.where(known, -_NEVER).amax(dim=(1, 2), keepdim=True) - least
    scale = _RESOLUTION / spread.where(spread > 0, 1.0)
    return ((scores - least) * scale).round().where(known, 0.0)


def _begin(table: Tensor, is_token: Tensor, count: Tensor) -> _Flow:
    """Every row in its best column at the first prices.  table: (G, T, E) whole numbers."""
    groups, tokens, experts = table.shape
    expert = torch.arange(experts, device=table.device)
    scores = table.new_full((groups, tokens + experts, experts + 1), -_NEVER)
    scores[:, :tokens, :experts] = table
    scores[:, tokens + expert, expert] = 0.0
    scores[:, tokens:, experts] = 0.0
    exists = torch.cat([is_token, is_token.new_ones(groups, experts)], dim=1)
    floor, rest = count // experts, count % experts
    places = torch.cat([(floor + 1)[:, None].expand(-1, experts), rest[:, None]], dim=1)
    price = _first_prices(table / _RESOLUTION, is_token, count) * _RESOLUTION
    # X costs what lets the blank rows of the dearest experts, `rest` of them, prefer it
    marginal = price.sort(dim=1, descending=True).values.gather(1, rest[:, None])
    price = torch.cat([price, marginal], dim=1).round()
    return _Flow(scores, exists, places, price, (scores - price[:, None]).argmax(dim=2))


def _first_prices(scores: Tensor, is_token: Tensor, count: Tensor) -> Tensor:
    """(G, E) float64: prices at which few tokens are too many; of those met, each group's best.

    scores: (G, T, E) from 0 to 1.  float32 inside: a starting point may be rough.
    """
    scores, present = scores.float(), is_token[..., None].float()
    even = count[:, None].float() / scores.shape[2]
    # what is common to all tokens first
    price = (scores * present).sum(dim=1) / count[:, None].clamp(min=1)
    best, least = price, torch.full_like(count, scores.shape[1] + 1)
    for temperature in _TEMPERATURES:
        for _ in range(2):
            price = _newton_step(price, scores, present, even, temperature)
        loads = _loads((scores - price[:, None]).argmax(dim=2), is_token, scores.shape[2])
        excess = (loads - even.ceil().to(torch.int64)).clamp(min=0).sum(dim=1)
        # a group that is good enough keeps its prices, whatever the others of its microbatch need
        better = (excess < least) & (2 * least > scores.shape[2])
        best = price.where(better[:, None], best)
        least = excess.where(better, least)
        if bool((2 * least <= scores.shape[2]).all()):
            break
    return best.to(torch.float64)


def _newton_step(price: Tensor, scores: Tensor, present: Tensor, even: Tensor, temperature: float) -> Tensor:
    """One damped step towards prices at which every expert's smooth load is `even`, (G, 1)."""
    shares = ((scores - price[:, None]) / temperature).softmax(dim=2) * present
    load = shares.sum(dim=1)
    slope = torch.diag_embed(load) - shares.transpose(1, 2) @ shares
    # prices are free up to a constant, and experts without tokens have no slope at all
    damping = torch.diag_embed((1e-3 * even + 1e-6).expand_as(load)) + (even / load.shape[1])[..., None]
    step: Tensor = torch.linalg.solve_ex(slope + damping, load - even).result
    return price + temperature * step.nan_to_num().clamp(-2.0, 2.0)


def _next_round(flow: _Flow) -> _Flow:
    """Prices after one search for shortest paths, and tokens moved along those that do not meet."""
    columns = flow.places.shape[1]
    over, under = (flow.load - flow.places).clamp(min=0), (flow.places - flow.load).clamp(min=0)
    loss = flow.scores.gather(2, flow.column[..., None]) - flow.scores
    loss.masked_fill_(~flow.exists[..., None], _NEVER)
    least = torch.full_like(flow.price[..., None].expand(-1, -1, columns), _NEVER)
    # (G, M, M): what moving one row from one column to another costs at least
    least = least.scatter_reduce(1, flow.column[..., None].expand_as(loss), loss, "amin")
    distance, parent = _shortest_paths(least - flow.price[..., None] + flow.price[:, None], over > 0)
    # who could make the last step of the path to each column: few, so they are listed, by column and row
    before = parent.masked_fill(parent == torch.arange(columns, device=parent.device), columns)
    movable = (loss == least.gather(1, parent[:, None])) & (flow.column[..., None] == before[:, None])
    group, target, row = movable.transpose(1, 2).nonzero(as_tuple=True)
    step = group * columns + target
    width = torch.bincount(step, minlength=parent.numel())
    place = torch.arange(len(row), device=row.device) - (width.cumsum(0) - width)[step]
    first = torch.zeros_like(width).scatter_reduce(0, step, row, "amin", include_self=False)
    amount = _amounts(distance, parent, width.view_as(parent), first.view_as(parent), over, under)
    chosen = place < amount.flatten()[step]
    column = flow.column.index_put((group[chosen], row[chosen]), target[chosen])
    return _Flow(flow.scores, flow.exists, flow.places, flow.price - distance, column)


def _shortest_paths(cost: Tensor, is_source: Tensor) -> tuple[Tensor, Tensor]:
    """Both (G, M): distance from the nearest source, and the column before on the way; a source is its own.

    cost: (G, M, M) from row to column, not negative.  Bellman-Ford; distances are 0 in a group without a source.
    """
    columns = cost.shape[1]
    into = cost.transpose(1, 2).contiguous()
    distance = torch.full_like(cost[:, 0], _NEVER).masked_fill(is_source, 0.0)
    parent = torch.arange(columns, device=cost.device).expand_as(distance)
    for _ in range(columns):
        found = (distance[:, None] + into).min(dim=2)
        # a parent changes with its distance only: so even free circles never close
        better = found.values < distance
        if not bool(better.any()):
            break
        distance, parent = found.values.where(better, distance), found.indices.where(better, parent)
    return distance.where(distance < _NEVER, 0.0), parent


def _amounts(distance: Tensor, parent: Tensor, width: Tensor, first: Tensor, over: Tensor, under: Tensor) -> Tensor:
    """(G, M) int64: rows that move into each column from its parent, along paths that do not meet.

    width: (G, M) int64: how many rows could make that step.   first: (G, M) int64: the first of them.  Nearer paths go
    first; two paths meet where they want the same row, or, if one of them brings more than one, where they leave the
    same column.
    """
    columns = distance.shape[1]
    itself = torch.arange(columns, device=distance.device)
    is_step = parent != itself
    on_path = (itself[:, None] == itself) & is_step[..., None]  # (G, M, M): steps of the path that ends in each row
    root = parent
    for _ in range(columns.bit_length()):
        on_path = on_path | on_path.gather(1, root[..., None].expand_as(on_path))
        root = root.gather(1, root)
    narrowest = width[:, None].masked_fill(~on_path, torch.iinfo(torch.int64).max).amin(dim=2)
    wanted = torch.minimum(torch.minimum(narrowest, under), over.gather(1, root)).masked_fill(~is_step, 0)
    order = distance.masked_fill(wanted == 0, _NEVER).argsort(dim=1, stable=True)
    place = order.argsort(dim=1)
    before = (place[:, None] < place[..., None]) & (wanted > 0)[:, None]
    meets = _meet(on_path, first) | (_meet(on_path, parent) & ((wanted[:, None] > 1) | (wanted[..., None] > 1)))
    accepted = wanted.masked_fill((meets & before).any(dim=2), 0)
    # a root gives no more than it has too many
    same_root = (root[:, None] == root[..., None]) & before
    given = (accepted[:, None] * same_root).sum(dim=2)
    accepted = torch.minimum(accepted, (over.gather(1, root) - given).clamp(min=0))
    return (accepted[..., None] * on_path).sum(dim=1)


def _meet(on_path: Tensor, name: Tensor) -> Tensor:
    """(G, M, M) bool: whether two paths have steps of the same name.  name: (G, M) int64 of each step."""
    steps = on_path.float()
    same = (name[:, None] == name[..., None]).float()
    return (steps @ same @ steps.transpose(1, 2)) > 0


def _filled(column: Tensor, is_token: Tensor, count: Tensor, experts: int) -> Tensor:
    """A balanced assignment near the one given: who is too many goes to the free places, both in their order.

    column: (G, T) int64, `experts` and above for tokens that sit nowhere.
    """
    column = column.masked_fill(~is_token, experts)
    load = _loads(column, is_token, experts + 1)[:, :experts]
    # the fullest experts have the larger share
    rank = load.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    places = (count // experts)[:, None] + (rank < (count % experts)[:, None])
    order = column.argsort(dim=1, stable=True)
    sorted_column = column.gather(1, order)
    queued = torch.arange(column.shape[1], device=column.device) - torch.searchsorted(sorted_column, sorted_column)
    limit = torch.cat([places, torch.zeros_like(places[:, :1])], dim=1).gather(1, sorted_column)
    homeless = torch.empty_like(is_token).scatter_(1, order, queued >= limit) & is_token
    free = (places - load).clamp(min=0).cumsum(dim=1)
    place = homeless.cumsum(dim=1) - 1
    return torch.searchsorted(free, place.clamp(min=0), right=True).where(homeless, column)
