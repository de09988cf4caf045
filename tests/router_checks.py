"""What every router is held to, whatever its rule; tests/moe/routers/test_registry.py runs it over the registry."""

from collections.abc import Callable
from dataclasses import replace

import torch
from moe_rows import VOCAB, make_router, rows_of, token_info, weights_of
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.methods import find_method
from megatron_moe.moe.plan import RoutingPlan, TokenInfo
from megatron_moe.moe.routers.router import Router
from megatron_moe.parallel.layout import layout_of

HIDDEN = 6


def draw_tokens(info: TokenInfo, seed: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """(T, H) normal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(info.keys), HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def informed(router: Router, info: TokenInfo) -> TokenInfo:
    """The info, with keys of the experts where the router reads them."""
    if not router.reads_expert_keys:
        return info
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(router.config.num_experts, HIDDEN, generator=generator, dtype=torch.float64)
    return replace(info, expert_keys=keys.requires_grad_())


def objective(plan: RoutingPlan, rows: Tensor | None = None) -> Tensor:
    """A loss that reads every served weight, each with a factor of its own, and all auxiliary losses."""
    tokens = plan.token_ids if rows is None or not rows.numel() else rows[plan.token_ids]
    factor = torch.sin(1.0 + 3.0 * tokens + 7.0 * plan.expert_ids)
    served = plan.expert_ids < plan.num_experts
    answer = (plan.combine_weights * factor.to(plan.combine_weights.dtype)).masked_fill(~served, 0.0).sum()
    return answer + torch.stack([answer * 0, *(loss.share * loss.weight for loss in plan.aux_losses.values())]).sum()


def group_samples(config: MoEConfig, otherwise: int) -> int:
    """Samples of a routing group: `otherwise`, unless the case names a number, or none has an effect: one then."""
    fixed = "routing_group_samples" in find_method(config.router_type).unused_fields
    return config.routing_group_samples if fixed or config.routing_group_samples > 1 else otherwise


def check_router(config: MoEConfig) -> None:
    """Valid plan, finite gradient, padding goes nowhere, same seed same plan, nothing written to the router."""
    info = token_info(8, 4, group_samples=group_samples(config, 2), padding=[(7, 0), (6, 0), (7, 3), (0, 1)])
    router = make_router(config, HIDDEN)
    before = {name: value for name, value in vars(router).items() if name != "_parameters"}
    state = {name: value.clone() for name, value in router.state_dict().items()}
    info = informed(router, info)
    tokens = draw_tokens(info).requires_grad_()
    plan = router(tokens, info)
    check_plan(plan, info, signed=router.wraps_block)
    check_reach(router, tokens, info, objective(plan))
    again = router(tokens, info)
    assert weights_of(again) == weights_of(plan)
    assert {name: value for name, value in vars(router).items() if name != "_parameters"} == before
    assert all(torch.equal(value, state[name]) for name, value in router.state_dict().items())
    assert all(layout_of(parameter).sum_over == ("tp",) for parameter in router.parameters())


def check_reach(router: Router, tokens: Tensor, info: TokenInfo, loss: Tensor) -> None:
    """The gradient reaches tokens, not padding, and all that is learned; with constant weights that is nothing."""
    if not loss.requires_grad:
        assert not list(router.parameters())
        return
    loss.backward()
    for name, leaf in [("tokens", tokens), *router.named_parameters()]:
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0, name
    assert tokens.grad is not None and not tokens.grad[info.is_padding].any()


def check_plan(plan: RoutingPlan, info: TokenInfo, *, signed: bool = False) -> None:
    """Shapes, dtypes and ranges; nobody is sent to the same expert twice; padding is sent nowhere.

    signed: a weight may be negative, as the raw score is that weighs a whole block.
    """
    assignments = len(plan.token_ids)
    assert plan.num_tokens == len(info.keys)
    assert plan.expert_ids.shape == plan.combine_weights.shape == (assignments,)
    assert plan.token_ids.dtype == plan.expert_ids.dtype == torch.int64
    assert plan.combine_weights.dtype == torch.float64
    assert plan.combine_weights.isfinite().all() and (signed or (plan.combine_weights >= 0).all())
    assert ((plan.token_ids >= 0) & (plan.token_ids < plan.num_tokens)).all()
    assert ((plan.expert_ids >= 0) & (plan.expert_ids <= plan.num_experts)).all()
    served = plan.expert_ids < plan.num_experts
    assert len(weights_of(plan)) == served.sum()
    assert served.any()
    assert not info.is_padding[plan.token_ids[served]].any()
    assert int(plan.mask().sum()) == int(served.sum()) == int(plan.tokens_per_expert().sum())
    assert not any(value.requires_grad for value in plan.stats.values())


def check_gradient(config: MoEConfig) -> None:
    """Finite differences of weights and losses with respect to tokens and parameters, decisions standing still."""
    info = token_info(3, 2, group_samples=group_samples(config, 1), padding=[(2, 1)])
    router = make_router(config, HIDDEN)
    info = informed(router, info)
    tokens = draw_tokens(info).requires_grad_()
    loss = objective(router(tokens, info))
    if not loss.requires_grad:
        return
    loss.backward()
    names = [name for name, _ in router.named_parameters()]
    keys = info.expert_keys
    live = [] if keys is None or keys.grad is None else [keys]

    def value(tokens: Tensor, *learned: Tensor) -> Tensor:
        named = dict(zip(names, learned[len(live) :], strict=True))
        known = replace(info, expert_keys=learned[0]) if live else info
        return objective(torch.func.functional_call(router, named, (tokens, known)))

    assert torch.autograd.gradcheck(value, (tokens, *live, *router.parameters()))


def leaks(decide: Callable[[Tensor, TokenInfo], RoutingPlan], samples: int = 2, trials: int = 12) -> bool:
    """Whether other values in the last position of a sequence ever change what happens to an earlier one.

    samples: of a routing group.
    """
    info = token_info(10, 2, group_samples=samples)
    tokens = draw_tokens(info)
    earlier = info.positions < 9
    before = _rows_of_plan(decide(tokens, info), earlier)
    for trial in range(trials):
        changed = tokens.clone()
        last = (info.positions == 9) & (info.sequences == trial % 2)
        changed[last] = 3 * draw_tokens(info, 100 + trial)[0]
        other = replace(info, ids=info.ids.where(~last, (info.ids + 1 + trial) % VOCAB))
        if _rows_of_plan(decide(changed, other), earlier) != before:
            return True
    return False


def _rows_of_plan(plan: RoutingPlan, rows: Tensor) -> dict[tuple[int, int], float]:
    return {pair: weight for pair, weight in weights_of(plan).items() if rows[pair[0]]}


def check_edges(router: Router) -> None:
    """No tokens, fewer than experts, a group of padding only, numbers that are none: there is a plan all the same."""
    samples = group_samples(router.config, 1)
    whole = informed(router, token_info(6, 2, group_samples=samples, padding=[(p, 1) for p in range(6)]))
    nothing = rows_of(replace(whole, num_groups=2), torch.arange(0))
    plan = router(torch.zeros(0, HIDDEN, dtype=torch.float64), replace(nothing, group_tokens=torch.zeros(2).long()))
    assert plan.num_tokens == 0 and len(plan.token_ids) == len(plan.combine_weights) == 0
    loss = objective(plan)
    if loss.requires_grad:
        loss.backward()
    tokens = draw_tokens(whole)
    plan = router(tokens, whole)
    assert {token % 2 for token, _ in weights_of(plan)} == {0}
    single = informed(router, token_info(1, group_samples=samples))
    check_plan(router(tokens[:1], single), single, signed=router.wraps_block)
    plan = router(torch.full_like(tokens, float("nan")), whole)
    assert ((plan.expert_ids >= 0) & (plan.expert_ids <= plan.num_experts)).all()
