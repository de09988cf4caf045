"""The program of capped expert choice: its optimum by a general solver, the sums it asks for, and the strict cap."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from megatron_moe.moe.routers.entropy_program import _log_sum, capped_wishes, within_cap


def draw(experts: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    return logits.softmax(dim=1).t()


def solved(scores: Tensor, takes: int, cap: int, *, entropy: float, iterations: int = 2000) -> Tensor:
    """S + a + u of one group without padding."""
    one = torch.ones(1, dtype=torch.int64)
    is_token = torch.ones(1, scores.shape[1], dtype=torch.bool)
    return capped_wishes(
        scores[None], is_token, one * takes, one * cap, most=takes, entropy=entropy, iterations=iterations
    )[0]


def shares(wishes: Tensor, entropy: float) -> Tensor:
    """A."""
    return (wishes / entropy).exp().clamp(max=1.0)


def chosen(wishes: Tensor, takes: int) -> Tensor:
    return torch.zeros_like(wishes, dtype=torch.bool).scatter(1, wishes.topk(takes, dim=1).indices, True)


@pytest.mark.parametrize(("experts", "tokens", "takes", "cap"), [(4, 12, 6, 2), (5, 9, 3, 2), (6, 20, 10, 3)])
@pytest.mark.parametrize("entropy", [0.05, 0.5])
def test_the_sums_are_those_that_were_asked_for(
    experts: int, tokens: int, takes: int, cap: int, entropy: float
) -> None:
    table = shares(solved(draw(experts, tokens), takes, cap, entropy=entropy), entropy)
    torch.testing.assert_close(table.sum(dim=1), torch.full((experts,), float(takes)).double(), rtol=1e-3, atol=0.0)
    assert (table.sum(dim=0) <= cap * (1 + 1e-3)).all()


def test_the_optimum_is_that_of_a_general_solver() -> None:
    scores, takes, cap, entropy = draw(3, 6, seed=4), 3, 2, 0.2
    scores[:, :2] += 0.4  # two tokens that everybody likes
    found = shares(solved(scores, takes, cap, entropy=entropy), entropy).numpy()

    def minus_objective(flat: np.ndarray) -> float:
        inner = np.clip(flat, 1e-300, None)
        return float(entropy * (inner * np.log(inner)).sum() - (scores.numpy().ravel() * flat).sum())

    constraints = [
        {"type": "eq", "fun": lambda flat: flat.reshape(3, 6).sum(axis=1) - takes},
        {"type": "ineq", "fun": lambda flat: cap - flat.reshape(3, 6).sum(axis=0)},
    ]
    best = minimize(minus_objective, np.full(18, 0.5), bounds=[(0, 1)] * 18, constraints=constraints, tol=1e-12)
    assert best.success
    np.testing.assert_allclose(found.ravel(), best.x, atol=1e-3)  # a sweep that moves prices less is the last
    assert (found.sum(axis=0) > cap - 1e-3).any()  # the cap is felt


def test_the_choice_with_the_papers_lambda_is_close_to_the_integer_optimum() -> None:
    scores, takes, cap = draw(8, 64, seed=1), 16, 2
    wishes = solved(scores, takes, cap, entropy=0.001, iterations=100)
    taken = within_cap(wishes[None], chosen(wishes, takes)[None], torch.tensor([takes]), torch.tensor([cap]))[0]
    rows = np.kron(np.eye(8), np.ones((1, 64)))
    columns = np.kron(np.ones((1, 8)), np.eye(64))
    best = linprog(-scores.numpy().ravel(), A_eq=rows, b_eq=[takes] * 8, A_ub=columns, b_ub=[cap] * 64, bounds=(0, 1))
    free = scores.topk(takes, dim=1).values.sum().item()
    assert scores[taken].sum().item() > -best.fun * 0.998
    assert -best.fun < free * 0.998  # the cap costs something


def test_without_a_cap_experts_take_what_they_like_best() -> None:
    scores = draw(4, 30)
    wishes = solved(scores, 15, 4, entropy=0.001, iterations=100)
    assert torch.equal(chosen(wishes, 15), chosen(scores, 15))


def test_at_most_five_in_a_hundred_tokens_are_over_the_cap_after_rounding() -> None:
    # many experts, as the paper has
    for cap in (2, 3):
        generator = torch.Generator().manual_seed(cap)
        scores = torch.randn(512, 64, generator=generator, dtype=torch.float64).softmax(dim=1).t()
        taken = chosen(solved(scores, 16, cap, entropy=0.001, iterations=100), 16)
        uncapped = (chosen(scores, 16).sum(dim=0) > cap).sum().item()
        over = (taken.sum(dim=0) > cap).sum().item()
        assert over < 0.05 * 512 < uncapped or over < uncapped / 4
        assert taken.sum(dim=0).max() <= cap + 1


@pytest.mark.parametrize("seed", range(30))
def test_a_strict_cap_is_kept_and_every_expert_is_full(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts, tokens = 3 + seed % 5, 4 + seed % 7
    cap = 1 + seed % (experts - 1)
    takes = cap * tokens // experts  # as tight as can be
    # all experts want the same tokens
    wishes = torch.randn(experts, tokens, generator=generator) + 3 * torch.randn(tokens, generator=generator)
    start = chosen(wishes, takes)
    taken = within_cap(wishes[None], start[None], torch.tensor([takes]), torch.tensor([cap]))[0]
    assert taken.sum(dim=1).tolist() == [takes] * experts
    assert taken.sum(dim=0).max() <= cap


def test_a_strict_cap_changes_nothing_that_keeps_it() -> None:
    wishes = solved(draw(4, 12), 6, 2, entropy=0.05)
    first = within_cap(wishes[None], chosen(wishes, 6)[None], torch.tensor([6]), torch.tensor([2]))
    assert torch.equal(within_cap(wishes[None], first, torch.tensor([6]), torch.tensor([2])), first)


def filled_by_loops(wishes: Tensor, taken: Tensor, takes: int, cap: int) -> Tensor:
    """What within_cap says it does, of one group: (E, T) of lists, one place after the other."""
    experts, tokens = taken.shape
    want, held = wishes.tolist(), taken.tolist()
    for t in range(tokens):
        for e in sorted((e for e in range(experts) if held[e][t]), key=lambda e: -want[e][t])[cap:]:
            held[e][t] = False
    while min(sum(row) for row in held) < takes:
        poorest = min(range(experts), key=lambda e: sum(held[e]))
        free = [t for t in range(tokens) if sum(row[t] for row in held) < cap and want[0][t] > -torch.inf]
        best = max((t for t in free if not held[poorest][t]), key=lambda t: want[poorest][t], default=None)
        if best is None:
            freed = max(free, key=lambda t: want[poorest][t])
            pairs = [(e, t) for e in range(experts) for t in range(tokens) if held[e][t] and not held[poorest][t]]
            other, best = max(
                ((e, t) for e, t in pairs if not held[e][freed]),
                key=lambda pair: want[poorest][pair[1]] - want[pair[0]][pair[1]] + want[pair[0]][freed],
            )
            held[other][best], held[other][freed] = False, True
        held[poorest][best] = True
    return torch.tensor(held)


@pytest.mark.parametrize("kind", ["different", "ties", "all equal", "the same for all experts"])
@pytest.mark.parametrize("seed", range(3))
def test_places_are_filled_one_by_one_in_every_group_by_itself(kind: str, seed: int) -> None:
    # groups that lack a different number of places: some are done long before the others
    generator = torch.Generator().manual_seed(seed)
    wishes = torch.randn(4, 5, 14, generator=generator, dtype=torch.float64)
    if kind == "ties":
        wishes = wishes.round()
    if kind == "all equal":
        wishes = torch.zeros_like(wishes)
    if kind == "the same for all experts":
        wishes = wishes[:, :1].expand_as(wishes).clone()
    tokens, cap = [14, 9, 5, 12], [2, 3, 1, 4]
    for group, real in enumerate(tokens):
        wishes[group, :, real:] = -torch.inf
    wishes[3, :, :12] += torch.eye(5, dtype=torch.float64)[:, torch.arange(12) % 5] * 9  # nothing to do for a while
    takes = [b * t // 5 for b, t in zip(cap, tokens, strict=True)]  # as tight as can be
    start = torch.stack([chosen(table, k) for table, k in zip(wishes, takes, strict=True)])
    before = start.clone()
    found = within_cap(wishes, start, torch.tensor(takes), torch.tensor(cap))
    assert torch.equal(start, before)
    for group in range(4):
        expected = filled_by_loops(wishes[group], start[group], takes[group], cap[group])
        assert torch.equal(found[group], expected), group
    missing = [(start[g].sum(dim=0) - cap[g]).clamp(min=0).sum().item() for g in range(4)]
    assert len(set(missing)) > 1


def test_an_expert_that_has_all_free_tokens_gets_one_by_exchange() -> None:
    # all want tokens 0 and 1: the third expert gets none, takes token 2, and then the first gives 0 and takes 2 as well
    wishes = torch.tensor([[5.0, 4.0, 0.0]]).repeat(3, 1)
    start = torch.tensor([[True, True, False]]).repeat(3, 1)
    found = within_cap(wishes[None], start[None], torch.tensor([2]), torch.tensor([2]))[0]
    assert found.int().tolist() == [[0, 1, 1], [1, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 2])
def test_the_sum_of_exponentials_is_that_of_torch_however_small_they_are(dtype: torch.dtype, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 1000 * torch.rand(2, 30, 40, generator=generator, dtype=dtype)
    values[0, 3], values[1, :, 4], values[0, 5:, 6:] = -torch.inf, -torch.inf, -torch.inf
    values[1, 7] = 2e4 * values[1, 7]  # one of these is far above the others
    expected = values.logsumexp(dim=dim)
    assert expected.isneginf().any()
    torch.testing.assert_close(_log_sum(values.clone(), dim), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0)


def test_groups_do_not_depend_on_each_other_and_padding_takes_nothing() -> None:
    # one group that the cap does not touch, one that it does, one of padding only
    easy, hard = torch.eye(4, dtype=torch.float64).repeat(1, 3), draw(4, 12, seed=2)
    is_token = torch.ones(3, 12, dtype=torch.bool)
    is_token[1, 9:], is_token[2] = False, False
    takes, cap = torch.tensor([3, 4, 0]), torch.tensor([2, 2, 2])
    together = capped_wishes(torch.stack([easy, hard, hard]), is_token, takes, cap, most=6, entropy=0.01, iterations=40)
    assert (together[1, :, 9:] == -torch.inf).all()
    assert (together[2] == -torch.inf).all()
    torch.testing.assert_close(together[0], solved(easy, 3, 2, entropy=0.01, iterations=40))
    torch.testing.assert_close(together[1, :, :9], solved(hard[:, :9], 4, 2, entropy=0.01, iterations=40))
    start = torch.zeros(3, 4, 12, dtype=torch.bool)
    filled = within_cap(together, start, takes, cap)
    assert filled.sum(dim=2).tolist() == [[3] * 4, [4] * 4, [0] * 4]
    assert not filled.any(dim=1)[~is_token].any()
    assert filled.sum(dim=1).max() == 2


def test_a_group_stops_by_itself() -> None:
    # sweeps until prices stand still differ from group to group
    groups = torch.stack([draw(4, 12, seed) for seed in range(6)])
    six = torch.ones(6, dtype=torch.int64)
    is_token = torch.ones(6, 12, dtype=torch.bool)
    together = capped_wishes(groups, is_token, 6 * six, 2 * six, most=6, entropy=0.05, iterations=2000)
    for scores, found in zip(groups, together, strict=True):
        torch.testing.assert_close(found, solved(scores, 6, 2, entropy=0.05), rtol=1e-12, atol=1e-12)
