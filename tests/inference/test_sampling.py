"""Choosing the next token, held against slow loops and hand-made distributions."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.config.errors import ConfigError
from megatron_moe.inference.sampling import Sampling, choose, draw, draw_keys, probabilities
from megatron_moe.parallel.random import KeyedRandom


def logits_of(*shares: float) -> torch.Tensor:
    return torch.tensor([[math.log(share) for share in shares]], dtype=torch.float64)


def slow_probabilities(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """One row, word by word: divide, keep the k best, keep the fewest that reach p, divide by the sum."""
    weights = [math.exp(logit / temperature) for logit in logits]
    best_first = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    kept = best_first[: top_k or len(logits)]
    total = sum(weights[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        nucleus.append(token)
        reached += weights[token] / total
        if reached >= (top_p or 1.0):
            break
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 1.0])
def test_temperature_top_k_and_top_p_follow_their_definitions(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    rows = np.random.default_rng(1).normal(size=(6, 11))
    rows[0, 4] = rows[0, 7] = rows[0].max() + 1  # a tie for the first place
    found = probabilities(torch.tensor(rows), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    wanted = [slow_probabilities(row.tolist(), temperature, top_k, top_p) for row in rows]
    assert np.allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-15)


def test_top_p_takes_the_token_that_crosses_the_line() -> None:
    found = probabilities(logits_of(0.1, 0.5, 0.3, 0.1), Sampling(top_p=0.6))
    assert found.tolist()[0] == pytest.approx([0, 0.625, 0.375, 0])


def test_top_p_counts_what_top_k_has_left() -> None:
    """Of 0.4, 0.3, 0.2, 0.1 the first two become 4/7 and 3/7: the first alone reaches 0.5."""
    found = probabilities(logits_of(0.4, 0.3, 0.2, 0.1), Sampling(top_k=2, top_p=0.5))
    assert found.tolist()[0] == pytest.approx([1, 0, 0, 0])


def test_a_tiny_temperature_is_greedy_and_stays_finite() -> None:
    logits = torch.tensor([[800.0, -300.0, 801.0, 5.0]], dtype=torch.float64)
    assert probabilities(logits, Sampling(temperature=1e-300)).tolist() == [[0, 0, 1, 0]]


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    assert choose(logits, torch.tensor([0.99, 0.99]), Sampling(greedy=True)).tolist() == [1, 0]


def test_a_draw_takes_the_token_whose_interval_holds_the_number() -> None:
    shares = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    for uniform, token in [(0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (0.9999, 3), (1.0, 3)]:
        assert draw(shares, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token], uniform


def test_draws_follow_the_distribution() -> None:
    count = 20_000
    logits = logits_of(0.5, 0.3, 0.15, 0.05).expand(count, 4)
    uniform = KeyedRandom(3, stream="sample").uniform(draw_keys(torch.arange(count), 7))
    found = choose(logits, uniform, Sampling()).bincount(minlength=4) / count
    # four standard deviations of a share of one half
    assert (found - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 4 * math.sqrt(0.25 / count)


def test_every_sample_and_position_has_a_draw_of_its_own() -> None:
    keys = torch.cat([draw_keys(torch.arange(50), position) for position in range(50)])
    assert len(keys.unique()) == 2500


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0}, "--greedy"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"temperature": math.inf}, "--temperature inf"),
        ({"top_k": 0}, "--top-k 0"),
        ({"top_p": 0.0}, "--top-p 0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"greedy": True, "top_k": 3}, "no effect"),
        ({"greedy": True, "temperature": 0.5}, "no effect"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Sampling(**options)
