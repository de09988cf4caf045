"""THOR: who shares a draw, that draws are even and independent, and what evaluation does instead."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_layers import layer_of, run_layer
from moe_rows import NOBODY, make_router, rows_of, token_info
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import build_router
from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.routers.router import Router, Site

E = 4


def thor(group_samples: int = 1, **options: str) -> MoEConfig:
    return MoEConfig(num_experts=E, router_type="thor", routing_group_samples=group_samples, router_options=options)


def experts(router: Router, info: TokenInfo) -> Tensor:
    """(T,) the expert of each token."""
    plan = router(torch.zeros(len(info.keys), 3), info)
    assert plan.expert_ids.shape == plan.token_ids.shape and (plan.combine_weights == 1).all()
    return plan.expert_ids


def wide_info(train: bool = True, **changes: Any) -> TokenInfo:
    """12 positions of 30 samples, in groups of 3."""
    return replace(token_info(12, 30, group_samples=3, train=train), **changes)


def second_pass(info: TokenInfo) -> TokenInfo:
    """The same samples seen again; keys as the layer makes them."""
    again = 1 << 29
    return replace(
        info,
        passes=torch.ones_like(info.passes),
        sample_keys=info.sample_keys + again,
        global_keys=info.global_keys + (again << 32),
    )


def at(info: TokenInfo, **place: int) -> TokenInfo:
    return replace(info, random=info.random.at(**place))


@pytest.mark.parametrize(
    ("granularity", "shares"),
    [
        ("batch", lambda info: torch.zeros_like(info.groups)),
        ("group", lambda info: info.groups),
        ("sequence", lambda info: info.sequences),
        ("token", lambda info: torch.arange(len(info.keys))),
    ],
)
def test_exactly_those_who_share_a_draw_have_one_expert(granularity: str, shares: Any) -> None:
    router = make_router(thor(3, granularity=granularity), 3)
    info = wide_info()
    found = experts(router, info)
    sharers = shares(info)
    drawn = []
    for one in sharers.unique():
        chosen = found[sharers == one].unique()
        assert len(chosen) == 1
        drawn.append(int(chosen))
    # 10 groups meet two experts at least, 30 samples and 360 tokens all four
    assert len(set(drawn)) >= {"batch": 1, "group": 2}.get(granularity, E)


def test_a_group_is_known_by_its_first_sample_whatever_microbatch_it_stands_in() -> None:
    router = make_router(thor(3, granularity="group"), 3)
    whole = wide_info()
    found = experts(router, whole)
    # the microbatch of groups 4 and 5: its samples count from 0, their keys do not
    mine = (whole.sequences >= 12) & (whole.sequences < 18)
    part = rows_of(whole, mine.nonzero()[:, 0])
    part = replace(part, sequences=part.sequences - 12, groups=part.groups - 4)
    assert experts(router, part).tolist() == found[mine].tolist()


def chi_square(table: Tensor) -> float:
    """Of a table of counts against the product of its margins."""
    wanted = table.sum(dim=1, keepdim=True) * table.sum(dim=0, keepdim=True) / table.sum()
    return float(((table - wanted) ** 2 / wanted).sum())


def test_over_many_steps_each_expert_is_drawn_as_often_as_any_other() -> None:
    router = make_router(thor(), 3)
    info = token_info(1)
    drawn = torch.tensor([int(experts(router, at(info, step=step))) for step in range(4000)])
    counts = drawn.bincount(minlength=E).double()
    # chi square with 3 degrees of freedom: 16.3 once in a thousand
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3
    # a step's draw says nothing of the next: 9 degrees of freedom, 27.9 once in a thousand
    follows = torch.zeros(E, E, dtype=torch.float64)
    follows.index_put_((drawn[:-1], drawn[1:]), torch.ones(3999, dtype=torch.float64), accumulate=True)
    assert chi_square(follows) < 27.9


@pytest.mark.parametrize("granularity", ["batch", "group", "sequence", "token"])
def test_draws_are_even_and_independent_across_passes_layers_steps_and_seeds(granularity: str) -> None:
    router = make_router(thor(3, granularity=granularity), 3)
    changes = {
        "pass": second_pass,
        "layer": lambda info: at(info, layer=4),
        "step": lambda info: at(info, step=info.random.step + 5000),
        "seed": lambda info: replace(info, random=replace(info.random, seed=99)),
    }
    tables = {name: torch.zeros(E, E, dtype=torch.float64) for name in changes}
    # one token of each group, so that no draw is counted twice
    info = wide_info()
    rows = ((info.positions == 0) & (info.sequences % 3 == 0)).nonzero()[:, 0]
    if granularity == "batch":
        rows = rows[:1]
    few = rows_of(info, rows)
    for step in range(1600 // len(rows)):
        here = at(few, step=step)
        first = experts(router, here)
        for name, change in changes.items():
            one = torch.ones(len(rows), dtype=torch.float64)
            tables[name].index_put_((first, experts(router, change(here))), one, accumulate=True)
    for name, table in tables.items():
        # chi square with 9 degrees of freedom: 27.9 once in a thousand
        assert chi_square(table) < 27.9, name
        assert ((table.sum(dim=0) - 400) ** 2 / 400).sum() < 16.3, name


@pytest.mark.parametrize("granularity", ["batch", "group", "sequence", "token"])
def test_a_draw_follows_its_token_to_whichever_rank_holds_it(granularity: str) -> None:
    router = make_router(thor(3, granularity=granularity), 3)
    info = wide_info()
    found = experts(router, info)
    rows = torch.randperm(360)[:100]
    assert experts(router, rows_of(info, rows)).tolist() == found[rows].tolist()


def test_both_passes_of_a_step_differ_but_each_repeats_itself() -> None:
    router = make_router(thor(granularity="token"), 3)
    info = wide_info()
    first, second = experts(router, info), experts(router, second_pass(info))
    assert (first == second).double().mean().item() == pytest.approx(1 / E, abs=0.1)
    assert torch.equal(second, experts(router, second_pass(info)))
    assert router.is_random and not list(router.parameters())


@pytest.mark.parametrize(("inference", "distinct"), [("token", 360), ("sequence", 30)])
def test_evaluation_draws_by_the_seed_of_the_run_and_the_layer_alone(inference: str, distinct: int) -> None:
    info = wide_info(train=False)

    def found(seed: int = 0, layer: int = 0, known: TokenInfo = info) -> Tensor:
        site = Site(NOBODY, torch.float64, seed=seed, layer=layer)
        return experts(build_router(thor(inference=inference), 3, site), known)

    first = found()
    assert torch.equal(first, found(known=at(info, step=77)))
    for other in (found(seed=1), found(layer=1)):
        assert not torch.equal(first, other)
    by_sample = first.view(12, 30)
    assert (by_sample == by_sample[0]).all() == (inference == "sequence")
    counts = (by_sample[0] if inference == "sequence" else first).bincount(minlength=E).double()
    assert counts.sum() == distinct
    assert ((counts - distinct / E) ** 2 / (distinct / E)).sum() < 16.3


def test_training_draws_and_evaluation_draws_have_streams_of_their_own() -> None:
    info = wide_info()
    router = make_router(thor(granularity="token", inference="token"), 3)
    trained, tested = experts(router, info), experts(router, replace(info, train=False))
    assert (trained == tested).double().mean().item() == pytest.approx(1 / E, abs=0.1)


def test_an_ensemble_is_the_mean_of_all_experts() -> None:
    hidden = torch.randn(5, 2, 3, dtype=torch.float64)
    whole = layer_of(make_router(thor(inference="ensemble"), 3), ffn_size=6, activation="swiglu")
    found = run_layer(whole, hidden, train=False)
    single = []
    for index in range(E):
        router = make_router(thor(inference="fixed", fixed_expert=str(index)), 3)
        layer = layer_of(router, ffn_size=6, activation="swiglu")
        layer.experts.load_state_dict(whole.experts.state_dict())
        single.append(run_layer(layer, hidden, train=False))
    torch.testing.assert_close(found, torch.stack(single).mean(dim=0))
    assert not torch.allclose(single[0], single[1], atol=1e-3)
    # training draws one as ever
    drawn = [experts(make_router(thor(inference=kind), 3), wide_info()) for kind in ("ensemble", "sequence")]
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("inference", ["token", "sequence", "ensemble"])
def test_equal_experts_are_the_dense_layer(inference: str) -> None:
    layer = layer_of(make_router(thor(inference=inference), 3), ffn_size=6, activation="relu")
    with torch.no_grad():
        for weight in (layer.experts.w1, layer.experts.w2):
            weight.copy_(weight[:1].clone().expand_as(weight))
    hidden = torch.randn(5, 2, 3, dtype=torch.float64)
    dense = (hidden @ layer.experts.w1[0, 0].T).relu() @ layer.experts.w2[0].T
    for train in (True, False):
        torch.testing.assert_close(run_layer(layer, hidden, train=train), dense)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (thor(inference="fixed"), r"inference=fixed needs fixed_expert=INDEX"),
        (thor(fixed_expert="1"), r"fixed_expert=1 has no effect with inference=sequence"),
        (thor(inference="fixed", fixed_expert="4"), r"fixed_expert=4: --num-experts 4 has 0\.\.3"),
        (thor(granularity="rank"), r"granularity=rank: expected batch, group, sequence or token"),
        (
            MoEConfig(num_experts=4, router_type="thor", expert_capacity_factor=1.25),
            r"--moe-expert-capacity-factor 1\.25 with thor",
        ),
        (
            MoEConfig(num_experts=4, router_type="thor", eval_capacity_factor=2.0),
            r"--moe-eval-capacity-factor 2 with thor",
        ),
        (MoEConfig(num_experts=4, router_type="thor", aux_loss_coeff=0.1), r"--moe-aux-loss-coeff 0\.1 has no effect"),
        (MoEConfig(num_experts=4, router_type="thor", router_topk=4), r"--moe-router-topk 4 has no effect"),
    ],
)
def test_wrong_options_are_refused_by_name(config: MoEConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(config, 3, Site(NOBODY))
