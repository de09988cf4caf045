"""Noisy top-k: the worked token, loops for both forms of the losses, noise that belongs to the token, and refusals."""

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from moe_rows import NOBODY, make_router, rows_of, token_info, weights_of
from router_checks import draw_tokens
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.routers.noisy_top_k import LEAST_DEVIATION, NoisyTopKRouter, squared_variation
from megatron_moe.moe.routers.router import Site
from megatron_moe.parallel.layout import layout_of, materialise
from megatron_moe.parallel.state import ParallelState

NORMAL = NormalDist()


def noisy_config(choices: int = 2, experts: int = 4, *, pre_softmax: bool = False, **options: str) -> MoEConfig:
    return MoEConfig(
        num_experts=experts,
        router_topk=choices,
        router_pre_softmax=pre_softmax,
        router_type="noisy_top_k",
        router_options=options,
    )


def noisy_router(config: MoEConfig, hidden: int = 6) -> NoisyTopKRouter:
    router = make_router(config, hidden)
    assert isinstance(router, NoisyTopKRouter)
    return router


def variation(values: list[float]) -> float:
    """Variance over squared mean."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


# one token: noiseless logits, what the noise makes of them, and its deviation
CLEAN, NOISY, DEVIATION = [1.0, 0.5, -0.2], [1.3, 0.2, 0.1], 0.6


def worked_router(noise: str, monkeypatch: pytest.MonkeyPatch) -> NoisyTopKRouter:
    """Three experts; its answer to the token CLEAN has the noise of the worked numbers."""
    options = {"noise_std": str(3 * DEVIATION)} if noise == "fixed" else {}
    router = noisy_router(noisy_config(experts=3, noise=noise, **options), 3)
    draws = torch.tensor([[(b - a) / DEVIATION for a, b in zip(CLEAN, NOISY, strict=True)]], dtype=torch.float64)
    monkeypatch.setattr(router, "_draws", lambda info: draws)
    token = torch.tensor(CLEAN, dtype=torch.float64)
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(3))
        if noise == "learned":
            # the same for every expert: ln(exp 0.6 - 1), of which softplus is 0.6
            router.get_parameter("noise_weight").copy_(math.log(math.expm1(DEVIATION)) * token / token.dot(token))
    return router


@pytest.mark.parametrize(
    ("noise", "thresholds", "chances"),
    [
        ("learned", [0.1, 0.1, 0.2], [0.9332, 0.7475, 0.2525]),
        # nobody is left out: the second largest for all
        ("fixed", [0.2, 0.2, 0.2], [0.9088, 0.6915, 0.2525]),
    ],
)
def test_the_worked_token_comes_out(
    noise: str, thresholds: list[float], chances: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    router = worked_router(noise, monkeypatch)
    plan = router(torch.tensor([CLEAN], dtype=torch.float64), token_info(1))
    assert plan.expert_ids.tolist() == [0, 1]
    assert plan.combine_weights.tolist() == pytest.approx(softmax([1.3, 0.2]))
    found = router._thresholds(torch.tensor([NOISY]), torch.tensor([[0, 1]])).expand(1, 3)
    assert found.flatten().tolist() == pytest.approx(thresholds)
    exact = [NORMAL.cdf((h - t) / DEVIATION) for h, t in zip(CLEAN, thresholds, strict=True)]
    assert exact == pytest.approx(chances, abs=1e-4)
    assert plan.aux_losses["load_loss"].share.item() == pytest.approx(variation(exact))
    spread = softmax(CLEAN) if noise == "fixed" else [*softmax([1.3, 0.2]), 0.0]
    assert plan.aux_losses["importance_loss"].share.item() == pytest.approx(variation(spread))
    assert {loss.weight for loss in plan.aux_losses.values()} == {0.1}


def test_the_worked_variation_comes_out_and_even_sums_have_none() -> None:
    info = token_info(3, padding=[(2, 0)])
    parts = torch.tensor(
        [[[1.0, 1.0, 0.5], [4.0, 1.0, 1.0]], [[2.0, 0.0, 1.5], [1.0, 4.0, 4.0]], [[9.0, 8.0, 7.0]] * 2]
    )
    # (3, 1, 2) and (5, 5, 5): the last token is padding
    assert squared_variation(parts, info, NOBODY).tolist() == pytest.approx([1 / 6, 0.0])


def test_groups_are_counted_one_by_one_and_empty_ones_not_at_all() -> None:
    info = token_info(2, 3, padding=[(0, 2), (1, 2)])
    first, second, padding = [[2, 0], [1, 1]], [[0, 0.5], [0, 1.5]], [[7, 8], [7, 8]]
    parts = torch.tensor([first, second, padding], dtype=torch.float64).transpose(0, 1).reshape(6, 1, 2)
    # (3, 1) varies by 1/4, (0, 2) by 1; together they would be even
    assert squared_variation(parts, info, NOBODY).tolist() == pytest.approx([0.25 + 1.0])


def slow_losses(router: NoisyTopKRouter, tokens: Tensor, noisy: Tensor, info: TokenInfo) -> tuple[float, float]:
    """Importance and load, summed over routing groups, by loops over tokens and experts."""
    learned, choices = router.options.noise == "learned", router.config.router_topk
    clean, hidden = (tokens @ router.get_parameter("weight").T).tolist(), tokens.tolist()
    importance_loss = load_loss = 0.0
    for group in range(info.num_groups):
        rows = [t for t in range(len(hidden)) if info.groups[t] == group and not info.is_padding[t]]
        if not rows:
            continue
        importance, load = [0.0] * len(clean[0]), [0.0] * len(clean[0])
        for row in rows:
            values = noisy[row].tolist()
            kept = sorted(range(len(values)), key=lambda e: -values[e])[:choices]
            sums = [math.exp(values[e]) for e in (range(len(values)) if router.config.router_pre_softmax else kept)]
            for expert in range(len(values)):
                others = values if not learned else values[:expert] + values[expert + 1 :]
                threshold = sorted(others)[-choices]
                deviation = router.options.noise_std / len(values)
                if learned:
                    raw = router.get_parameter("noise_weight")[expert].tolist()
                    deviation = math.log1p(math.exp(sum(a * b for a, b in zip(raw, hidden[row], strict=True))))
                load[expert] += NORMAL.cdf((clean[row][expert] - threshold) / deviation)
                if not learned:
                    importance[expert] += softmax(clean[row])[expert]
                elif expert in kept:
                    importance[expert] += math.exp(values[expert]) / sum(sums)
        importance_loss += variation(importance)
        load_loss += variation(load)
    return importance_loss, load_loss


@pytest.mark.parametrize("noise", ["learned", "fixed"])
@pytest.mark.parametrize(
    ("experts", "choices", "pre_softmax"), [(4, 2, False), (7, 3, True), (3, 2, False), (5, 1, True)]
)
def test_noisy_top_k_equals_the_loop(noise: str, experts: int, choices: int, pre_softmax: bool) -> None:
    options = {"noise": noise, **({"noise_std": "3"} if noise == "fixed" else {})}
    router = noisy_router(noisy_config(choices, experts, pre_softmax=pre_softmax, **options))
    info = token_info(5, 5, group_samples=2, padding=[(4, 0), (0, 3), *((p, 4) for p in range(5))])
    tokens = draw_tokens(info)
    plan = router(tokens, info)
    noisy = tokens @ router.get_parameter("weight").T + router._deviation(tokens) * router._draws(info)
    for row in range(25):
        values = noisy[row].tolist()
        kept = sorted(range(experts), key=lambda e: -values[e])[:choices]
        weights = [softmax(values)[e] for e in kept] if pre_softmax else softmax([values[e] for e in kept])
        found = [weights_of(plan).get((row, expert)) for expert in kept]
        assert found == ([None] * choices if info.is_padding[row] else pytest.approx(weights, rel=1e-12))
    importance, load = slow_losses(router, tokens, noisy, info)
    assert plan.aux_losses["importance_loss"].share.item() == pytest.approx(importance, rel=1e-10)
    assert plan.aux_losses["load_loss"].share.item() == pytest.approx(load, rel=1e-10)
    assert {loss.per for loss in plan.aux_losses.values()} == {"group"}


def test_both_weights_start_at_zero_and_the_noise_at_ln_2() -> None:
    router = build_router(noisy_config(), 6, Site(NOBODY, torch.float64))
    materialise(router, ParallelState.alone(), 7, torch.device("cpu"))
    assert isinstance(router, NoisyTopKRouter)
    assert sorted(name for name, _ in router.named_parameters()) == ["noise_weight", "weight"]
    assert all(not parameter.any() and layout_of(parameter).init.std is None for parameter in router.parameters())
    info = token_info(400, 5)
    tokens = draw_tokens(info)
    assert router._deviation(tokens).unique().tolist() == pytest.approx([math.log(2)])
    # noise alone: every expert gets its share, and both weights learn
    plan = router(tokens, info)
    assert plan.tokens_per_expert().tolist() == pytest.approx([1000] * 4, rel=0.1)
    sum(loss.share for loss in plan.aux_losses.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in router.parameters())


def test_fixed_noise_learns_nothing_of_its_own() -> None:
    router = noisy_router(noisy_config(noise="fixed", noise_std="2"))
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router._deviation(draw_tokens(token_info(3))).item() == 0.5


def test_draws_are_normal_and_belong_to_token_and_expert() -> None:
    router = noisy_router(noisy_config(experts=20))
    info = token_info(50, 10)
    draws = router._draws(info)
    assert draws.shape == (500, 20) and draws.dtype == torch.float64
    assert draws.mean().item() == pytest.approx(0.0, abs=0.03)
    assert draws.std().item() == pytest.approx(1.0, abs=0.03)
    assert (draws.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.02)
    assert draws.unique().numel() == draws.numel()
    assert (torch.corrcoef(draws.T) - torch.eye(20)).abs().max() < 0.25
    rows = torch.randperm(500)[:77]
    assert torch.equal(router._draws(rows_of(info, rows)), draws[rows])
    assert not torch.equal(router._draws(replace(info, random=info.random.at(step=1))), draws)


@pytest.mark.parametrize(("noise", "pre_softmax"), [("learned", False), ("fixed", True)])
def test_without_noise_it_is_top_k(noise: str, pre_softmax: bool) -> None:
    router = noisy_router(noisy_config(pre_softmax=pre_softmax, noise=noise))
    plain = make_router(MoEConfig(num_experts=4, router_pre_softmax=pre_softmax), 6)
    plain.load_state_dict({"weight": router.get_parameter("weight")})
    info = token_info(7, 3, train=False)
    tokens = draw_tokens(info)
    assert weights_of(router(tokens, info)) == weights_of(plain(tokens, info))
    assert router.is_random
    assert weights_of(router(tokens, replace(info, train=True))) != weights_of(plain(tokens, info))


def test_balance_counts_first_choices_and_z_reads_the_logits_without_noise() -> None:
    config = replace(noisy_config(), aux_loss_coeff=0.01, z_loss_coeff=0.001)
    router = noisy_router(config)
    info = token_info(6)
    tokens = draw_tokens(info)
    losses = router(tokens, info).aux_losses
    clean = tokens @ router.get_parameter("weight").T
    scores = (clean + router._deviation(tokens) * router._draws(info)).softmax(dim=1)
    first = scores.argmax(dim=1).bincount(minlength=4) / 6
    assert losses["load_balance_loss"].share.item() == pytest.approx(4 * (first * scores.mean(dim=0)).sum().item())
    assert losses["z_loss"].share.item() == pytest.approx(clean.logsumexp(dim=1).square().sum().item())


def test_losses_are_left_out_one_by_one() -> None:
    info = token_info(4)
    tokens = draw_tokens(info)
    for off in ({"importance_coeff"}, {"load_coeff"}, {"importance_coeff", "load_coeff"}):
        found = noisy_router(noisy_config(**dict.fromkeys(off, "0")))(tokens, info).aux_losses
        assert {name.replace("_loss", "_coeff") for name in found} == {"importance_coeff", "load_coeff"} - off
    weighed = noisy_router(noisy_config(importance_coeff="0.3", load_coeff="0.2"))(tokens, info).aux_losses
    assert {name: loss.weight for name, loss in weighed.items()} == {"importance_loss": 0.3, "load_loss": 0.2}


def test_noise_that_has_died_leaves_the_gradient_finite() -> None:
    router = make_router(noisy_config(), 6, dtype=torch.float32)
    assert isinstance(router, NoisyTopKRouter)
    tokens = torch.ones(5, 6)
    with torch.no_grad():
        router.get_parameter("noise_weight").fill_(-50.0)
    assert router._deviation(tokens).unique().item() == pytest.approx(LEAST_DEVIATION)
    losses = router(tokens, token_info(5)).aux_losses
    sum(loss.share for loss in losses.values()).backward()
    for parameter in router.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (noisy_config(1), r"--moe-router-topk 1 .* gradient to the router; add --moe-router-pre-softmax"),
        (noisy_config(4), r"load_coeff=0.1 has no effect where --moe-router-topk 4 .* use fewer, or load_coeff=0"),
        (noisy_config(noise_std="2"), r"noise_std=2 has no effect on learned noise; .* add noise=fixed"),
        (noisy_config(noise="fixed", noise_std="0"), r"noise_std=0: expected a number"),
        (noisy_config(noise="none"), r"noise=none: expected learned or fixed"),
        (noisy_config(load_coeff="-1"), r"load_coeff=-1: expected"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(config: MoEConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(config, 6, Site(NOBODY))


def test_every_expert_may_be_chosen_where_no_load_is_asked_for() -> None:
    plan = noisy_router(noisy_config(4, load_coeff="0"))(draw_tokens(token_info(3)), token_info(3))
    assert plan.tokens_per_expert().tolist() == [3] * 4
