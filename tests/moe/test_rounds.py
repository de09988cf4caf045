"""A rank never receives more rows at once than was said, and the rounds together are the plan."""

from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.certify.tiny_model import VOCAB, samples, tiny_config
from megatron_moe.moe.dispatch.all_to_all import AllToAllDispatcher
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.plan import RoutingPlan
from megatron_moe.moe.rounds import in_rounds
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine, grid_of

EXPERTS, TOKENS = 8, 13
SKEWED = [0.6, 0.1, 0.1, 0.05, 0.05, 0.05, 0.0, 0.05]


def plan_of(rank: int, shares: list[float]) -> RoutingPlan:
    """Two choices of each token, some of them nobody, drawn by these shares; another number of tokens on each rank."""
    draw = torch.Generator().manual_seed(rank)
    tokens = TOKENS + 3 * rank
    chosen = torch.multinomial(torch.tensor(shares), 2 * tokens, replacement=True, generator=draw)
    chosen[::7] = EXPERTS
    token_ids = torch.arange(tokens).repeat_interleave(2)
    return RoutingPlan(tokens, EXPERTS, token_ids, chosen, torch.rand(2 * tokens, generator=draw))


def rounds_on_rank(rank: int, world_size: int, ep: int, factor: float, shares: list[float]) -> dict[str, Any]:
    state = ParallelState.distributed(Grid(world_size, ep=ep, etp=world_size // ep))
    plan = plan_of(rank, shares)
    dispatcher = AllToAllDispatcher(EXPERTS, state.ep, state.etp)
    rounds = in_rounds(plan, factor, state.ep, state.etp)
    received = [len(dispatcher.dispatch(torch.randn(plan.num_tokens, 4), part).rows) for part in rounds]
    served = torch.stack([part.expert_ids for part in rounds])
    return {
        "received": received,
        "once": bool(((served < EXPERTS).sum(dim=0) == (plan.expert_ids < EXPERTS)).all()),
        "same": bool((served.amin(dim=0) == plan.expert_ids).all()),
        "rows": int((plan.expert_ids < EXPERTS).sum()),
    }


@pytest.mark.parametrize("ep", [4, 2])
@pytest.mark.parametrize("factor", [1.0, 1.3, 8.0])
def test_no_rank_receives_more_than_its_part_at_once(ep: int, factor: float) -> None:
    found = run_on_ranks(4, rounds_on_rank, ep, factor, SKEWED)
    bound = -(-factor * sum(rank["rows"] for rank in found) // ep)
    assert all(rank["once"] and rank["same"] for rank in found)
    most = max(sum(rank["received"]) for rank in found)
    for rank in found:
        assert max(rank["received"]) <= bound and len(rank["received"]) == -(-most // bound)
    # all rows arrive; under etp each of them at both halves
    assert sum(sum(rank["received"]) for rank in found) == (4 // ep) * sum(rank["rows"] for rank in found)
    assert (len(found[0]["received"]) > 1) == (factor < 8)


def test_even_parts_come_at_once() -> None:
    assert all(len(rank["received"]) == 1 for rank in run_on_ranks(2, rounds_on_rank, 2, 2.0, [1.0] * EXPERTS))


def counted_on_rank(rank: int, world_size: int, factor: float | None) -> tuple[int, float]:
    """How often a layer sends rows, forward and again in the backward pass, and the loss."""
    parallel = {"expert_model_parallel_size": 2, "expert_rank_capacity_factor": factor}
    config = tiny_config({"router_type": "switch", "layer_freq": "4"}, parallel, {})
    engine = Engine(config, ParallelState.distributed(grid_of(config, world_size)), torch.device("cpu"), VOCAB)
    (layer,) = engine.stages[0].moe_layers().values()
    assert isinstance(layer, MoELayer)
    with torch.no_grad():
        layer.router.get_parameter("weight")[1:] = 0.0
        layer.router.get_parameter("weight")[0] *= 50.0
    right, calls = layer.dispatcher.dispatch, []

    def dispatch(*arguments: Any) -> Any:
        calls.append(1)
        return right(*arguments)

    layer.dispatcher.dispatch = dispatch  # type: ignore[method-assign]
    loss = engine.train_step(0, [samples([2 * rank, 2 * rank + 1])]).metrics.loss
    return len(calls), loss


def test_further_rounds_are_run_again_instead_of_kept_and_change_nothing() -> None:
    plain = run_on_ranks(2, counted_on_rank, None)
    bounded = run_on_ranks(2, counted_on_rank, 1.0)
    assert [calls for calls, _ in plain] == [1, 1]
    assert [calls for calls, _ in bounded] == [4, 4]  # two rounds, each twice
    assert bounded[0][1] == pytest.approx(plain[0][1], rel=1e-12)
