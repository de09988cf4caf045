"""By node and then by rank: the answers and all gradients of the local dispatcher, whatever the plan."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.moe.dispatch.dispatcher import Dispatcher, NodeAxes
from megatron_moe.moe.layer import build_dispatcher
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState

E, H, F = 8, 5, 4
ALONE = ParallelState.alone()
# ranks, ep, ranks of ep in a node, etp
GRIDS = [(4, 4, 2, 1), (4, 2, 1, 2), (8, 8, 4, 1), (8, 8, 2, 1), (8, 4, 2, 2), (8, 4, 4, 2), (8, 4, 1, 1)]
KINDS = ("drawn", "drawn", "one expert", "nobody", "no assignment", "no token on the last rank", "one node")
# float64 sums in another order
TOLERANCE = 1e-13

Found = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """The plans, tokens and keys of all ranks for one kind and seed; ranks have different numbers of tokens."""

    kind: str
    seed: int
    ranks: int

    def of(self, rank: int) -> tuple[Tensor, RoutingPlan, Tensor, Tensor]:
        """Tokens, plan, keys and the output's gradient; the first feature of a token is its key."""
        draw = torch.Generator().manual_seed(1000 * self.seed + rank)
        empty = self.kind == "no token on the last rank" and rank == self.ranks - 1
        tokens = 0 if empty else int(torch.randint(1, 9, (), generator=draw))
        number = 0 if empty or self.kind == "no assignment" else 3 * tokens
        experts = torch.randint(0, E + 1, (number,), generator=draw)  # E: nobody
        if self.kind == "one expert":
            experts.fill_(self.seed % E)
        if self.kind == "nobody":
            experts.fill_(E)
        if self.kind == "one node":
            experts %= 2
        # any number of choices of a token, in any order, one expert perhaps twice
        token_ids = torch.randint(0, max(1, tokens), (number,), generator=draw)
        weights = torch.randn(number, generator=draw, dtype=torch.float64)
        rows = torch.randn(tokens, H, generator=draw, dtype=torch.float64)
        keys = 100 * rank + torch.arange(tokens)
        rows[:, 0] = keys
        gradient = torch.randn(tokens, H, generator=draw, dtype=torch.float64)
        return rows, RoutingPlan(tokens, E, token_ids, experts, weights), keys, gradient

    def whole(self) -> tuple[Tensor, RoutingPlan, Tensor, Tensor]:
        """Of all ranks as one."""
        parts = [self.of(rank) for rank in range(self.ranks)]
        starts = np.cumsum([0, *(part[1].num_tokens for part in parts)]).tolist()
        plan = RoutingPlan(
            starts[-1],
            E,
            torch.cat([part[1].token_ids + start for part, start in zip(parts, starts, strict=False)]),
            torch.cat([part[1].expert_ids for part in parts]),
            torch.cat([part[1].combine_weights for part in parts]),
        )
        rows, keys, gradient = (torch.cat([part[place] for part in parts]) for place in (0, 2, 3))
        return rows, plan, keys, gradient


def matrices() -> tuple[Tensor, Tensor]:
    """(E, H, F) and (E, F, H) of all experts."""
    draw = torch.Generator().manual_seed(5)
    first = torch.randn(E, H, F, generator=draw, dtype=torch.float64)
    # keys are large numbers
    first[:, 0] *= 0.001
    return first, torch.randn(E, F, H, generator=draw, dtype=torch.float64)


def there_and_back(
    dispatcher: Dispatcher, given: tuple[Tensor, RoutingPlan, Tensor, Tensor], first: Tensor, second: Tensor
) -> Found:
    """Through these experts, forward and backward; first (e, H, f) and second (e, f, H) are this rank's."""
    rows, plan, keys, gradient = given
    leaves = [part.clone().requires_grad_() for part in (rows, plan.combine_weights, first, second)]
    plan = RoutingPlan(plan.num_tokens, E, plan.token_ids, plan.expert_ids, leaves[1])
    batch = dispatcher.dispatch(leaves[0], plan, keys)
    assert batch.keys is not None and torch.equal(batch.rows[:, 0].long(), batch.keys)
    parts = batch.rows.split(batch.tokens_per_expert)
    answers = torch.cat([part @ w1 for part, w1 in zip(parts, leaves[2], strict=True)]).tanh()
    parts = answers.split(batch.tokens_per_expert)
    answers = torch.cat([part @ w2 for part, w2 in zip(parts, leaves[3], strict=True)])
    out = dispatcher.combine(answers, batch)
    out.backward(gradient)
    names = ("tokens", "weights", "first", "second")
    gradients = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
    found = {"out": out.detach(), **dict(zip(names, gradients, strict=True))}
    return {name: value.numpy() for name, value in found.items()}


def on_rank(rank: int, world_size: int, grid: Grid, cases: list[Case]) -> list[Found]:
    state = ParallelState.distributed(grid)
    nodes = NodeAxes(state.ep_node, state.ep_local)
    dispatcher = build_dispatcher("hierarchical", E, state.ep, state.etp, nodes=nodes)
    experts, features = slice_of(E, state.ep.size, state.ep.rank), slice_of(F, state.etp.size, state.etp.rank)
    first, second = matrices()
    mine = first[experts, :, features], second[experts, features]
    return [there_and_back(dispatcher, case.of(rank), *mine) for case in cases]


def slice_of(total: int, size: int, rank: int) -> slice:
    return slice(total // size * rank, total // size * (rank + 1))


def put_together(grid: Grid, answers: list[Found]) -> Found:
    """Rows one after another; matrices into their places, summed over the copies of each."""
    found = {name: np.concatenate([answer[name] for answer in answers]) for name in ("out", "tokens", "weights")}
    first, second = np.zeros((E, H, F)), np.zeros((E, F, H))
    for rank, answer in enumerate(answers):
        _, _, ep, etp = grid.expert_coordinates(rank)
        experts, features = slice_of(E, grid.ep, ep), slice_of(F, grid.etp, etp)
        first[experts, :, features] += answer["first"]
        second[experts, features] += answer["second"]
    return {**found, "first": first, "second": second}


@pytest.mark.parametrize(("ranks", "ep", "per_node", "etp"), GRIDS)
def test_answers_and_gradients_are_those_of_the_local_dispatcher(ranks: int, ep: int, per_node: int, etp: int) -> None:
    grid = Grid(ranks, ep=ep, etp=etp, ep_ranks_per_node=per_node)
    cases = [Case(kind, seed, ranks) for seed, kind in enumerate(KINDS)]
    answers = run_on_ranks(ranks, on_rank, grid, cases)
    for number, case in enumerate(cases):
        local = build_dispatcher("local", E, ALONE.ep, ALONE.etp)
        wanted = there_and_back(local, case.whole(), *matrices())
        found = put_together(grid, [answer[number] for answer in answers])
        for name, value in wanted.items():
            error = np.abs(found[name] - value).max(initial=0.0)
            assert error <= TOLERANCE * max(1.0, np.abs(value).max(initial=0.0)), (case, name, error)


def narrow_on_rank(rank: int, world_size: int) -> bool:
    """Whether sums of 32 answers in bfloat16 are rounded where they travel and nowhere else, on 2 nodes of 2."""
    state = ParallelState.distributed(Grid(world_size, ep=4, ep_ranks_per_node=2))
    nodes = NodeAxes(state.ep_node, state.ep_local)
    dispatcher = build_dispatcher("hierarchical", 32, state.ep, state.etp, nodes=nodes)
    draw = torch.Generator().manual_seed(rank)
    # few enough digits that a sum in float32 is exact in any order
    rows = torch.randint(128, 256, (64, H), generator=draw).to(torch.bfloat16) / 128
    weights = torch.randint(4, 12, (64 * 32,), generator=draw).float() / 8
    token_ids, experts = torch.arange(64).repeat_interleave(32), torch.arange(32).repeat(64)
    batch = dispatcher.dispatch(rows, RoutingPlan(64, 32, token_ids, experts, weights))
    out = dispatcher.combine(batch.rows, batch)
    of_ranks = (rows.float() * weights.view(64, 4, 8).sum(dim=2).t()[..., None]).to(torch.bfloat16)  # (4, 64, H)
    of_nodes = of_ranks.float().view(2, 2, 64, H).sum(dim=1).to(torch.bfloat16)
    return torch.equal(out, of_nodes.float().sum(dim=0).to(torch.bfloat16))


def test_sums_are_wide_and_only_what_travels_is_narrow() -> None:
    assert all(run_on_ranks(4, narrow_on_rank))


@pytest.mark.parametrize(
    ("ep", "per_node", "expected"),
    [(4, 2, "Hierarchical"), (4, 1, "Hierarchical"), (4, 4, "OnePerRank"), (4, None, "OnePerRank"), (1, None, "Local")],
)
def test_auto_goes_by_node_where_there_are_several(ep: int, per_node: int | None, expected: str) -> None:
    state, _ = ParallelState.recorded(Grid(4, ep=ep, ep_ranks_per_node=per_node), rank=1)
    nodes = NodeAxes(state.ep_node, state.ep_local)
    found = build_dispatcher("auto", E, state.ep, state.etp, preferred="one_per_rank", nodes=nodes)
    assert type(found).__name__ == f"{expected}Dispatcher"
