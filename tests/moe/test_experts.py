"""What may stand between the two products of an expert: a bias and dropout, against loops, whole and split."""

from typing import Any

import pytest
import torch
from moe_rows import token_info
from ranks import run_on_ranks
from torch import Tensor, nn

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.dispatch.dispatcher import NodeAxes
from megatron_moe.moe.expert_dropout import ExpertDropout
from megatron_moe.moe.experts import Draws, Experts
from megatron_moe.moe.layer import DISPATCHERS, build_dispatcher
from megatron_moe.moe.plan import plan_from_choices
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.layout import layout_of, materialise
from megatron_moe.parallel.random import KeyedRandom
from megatron_moe.parallel.state import ParallelState

E, H, F = 4, 6, 10
ALONE = ParallelState.alone()
STREAM = KeyedRandom(5, step=2, stream="router", layer=3)


def make(state: ParallelState = ALONE, **more: Any) -> Experts:
    experts = Experts(E, H, F, "swiglu", state.ep, state.etp, init_std=0.5, output_std=0.5, dtype=torch.float64, **more)
    materialise(nn.ModuleDict({"experts": experts}), state, 7, torch.device("cpu"))
    return experts


def rows_and_counts() -> tuple[Tensor, list[int]]:
    counts = [3, 0, 1, 2]
    return torch.randn(sum(counts), H, generator=torch.Generator().manual_seed(1), dtype=torch.float64), counts


def by_loops(experts: Experts, rows: Tensor, counts: list[int], factor: Tensor) -> Tensor:
    """Row by row; factor (R, F) stands for dropout."""
    found, row = [], 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            gate, up = experts.w1[expert] @ rows[row]
            inner = torch.nn.functional.silu(gate) * up
            if experts.bias_kind == "additive":
                inner = inner + experts.bias[expert]
            if experts.bias_kind == "multiplicative":
                inner = inner * experts.bias[expert]
            found.append(experts.w2[expert] @ (inner * factor[row]))
            row += 1
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_a_bias_begins_without_effect_and_then_has_one(kind: str) -> None:
    rows, counts = rows_and_counts()
    experts = make(bias=kind)
    plain = make()(rows, counts, None)
    torch.testing.assert_close(experts(rows, counts, None), plain)
    with torch.no_grad():
        experts.bias.normal_(generator=torch.Generator().manual_seed(2))
    # a weight decay would pull a factor to 0
    assert not layout_of(experts.bias).decay
    found = experts(rows, counts, None)
    torch.testing.assert_close(found, by_loops(experts, rows, counts, torch.ones(len(rows), F)))
    assert (found - plain).abs().max() > 0.1
    found.sum().backward()
    assert experts.bias.grad is not None
    assert [bool(grad.any()) for grad in experts.bias.grad] == [True, False, True, True]


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    drop = ExpertDropout(0.3, ALONE.etp)
    tokens, experts = torch.arange(400) << 32, torch.arange(400) % E
    found = drop(torch.ones(400, 64, dtype=torch.float64), tokens, experts, STREAM)
    assert set(found.unique().tolist()) == {0.0, 1.0 / 0.7}
    # 25,600 draws: five standard deviations of a share of 0.3
    assert (found == 0).double().mean().item() == pytest.approx(0.3, abs=0.015)
    again = drop(torch.ones(400, 64, dtype=torch.float64), tokens, experts, STREAM)
    assert torch.equal(found, again)
    for other in (STREAM.at(step=3), STREAM.at(layer=4)):
        assert not torch.equal(found, drop(torch.ones(400, 64, dtype=torch.float64), tokens, experts, other))
    # another expert of the same token drops other features
    assert not torch.equal(found[:1], drop(torch.ones(1, 64, dtype=torch.float64), tokens[:1], experts[:1] + 1, STREAM))


def test_dropped_features_are_those_of_the_loops() -> None:
    rows, counts = rows_and_counts()
    experts = make(dropout=0.4, bias="multiplicative")
    keys = torch.tensor([7, 1, 1, 9, 4, 4])
    owners = torch.tensor([0, 0, 0, 2, 3, 3])
    factor = ExpertDropout(0.4, ALONE.etp)(torch.ones(6, F, dtype=torch.float64), keys, owners, STREAM)
    found = experts(rows, counts, None, Draws(keys, STREAM))
    torch.testing.assert_close(found, by_loops(experts, rows, counts, factor))
    assert torch.equal(factor[1], factor[2]) and not torch.equal(factor[0], factor[1])
    # and with nothing else between the products
    plain = make(dropout=0.4)
    torch.testing.assert_close(plain(rows, counts, None, Draws(keys, STREAM)), by_loops(plain, rows, counts, factor))
    # without draws, as in evaluation, nothing is dropped
    torch.testing.assert_close(experts(rows, counts, None), by_loops(experts, rows, counts, torch.ones(6, F)))


def kept_on_rank(rank: int, world_size: int) -> dict[str, list[tuple[int, int, list[float]]]]:
    """For each dispatcher: (token, expert, inner features after dropout) of this rank's rows, on EP 2 x ETP 2."""
    state = ParallelState.distributed(Grid(world_size, ep=2, etp=2, ep_ranks_per_node=1))
    nodes = NodeAxes(state.ep_node, state.ep_local)
    info = token_info(8, 2)
    mine = (torch.arange(16) % world_size == rank).nonzero()[:, 0]
    keys = info.global_keys[mine]
    choices = torch.stack([mine % E, (mine + 1) % E], dim=1)
    local = token_info(4)
    plan = plan_from_choices(choices, torch.ones(4, 2, dtype=torch.float64), local, num_experts=E)
    drop = ExpertDropout(0.5, state.etp)
    answers = {}
    for name in [name for name in DISPATCHERS if name != "local"]:
        dispatcher = build_dispatcher(name, E, state.ep, state.etp, nodes=nodes)
        batch = dispatcher.dispatch(torch.zeros(4, H).double(), plan, keys)
        assert batch.keys is not None
        owners = torch.arange(2).repeat_interleave(torch.tensor(batch.tokens_per_expert)) + 2 * state.ep.rank
        left = drop(torch.ones(len(owners), 3, dtype=torch.float64), batch.keys, owners, STREAM)
        answers[name] = list(zip(batch.keys.tolist(), owners.tolist(), left.tolist(), strict=True))
    return answers


def test_keys_travel_with_their_rows_through_every_dispatcher() -> None:
    answers = run_on_ranks(4, kept_on_rank)
    info = token_info(8, 2)
    keys = info.global_keys.repeat_interleave(2)
    owners = torch.stack([torch.arange(16) % E, (torch.arange(16) + 1) % E], dim=1).flatten()
    whole = ExpertDropout(0.5, ALONE.etp)(torch.ones(32, 6, dtype=torch.float64), keys, owners, STREAM)
    wanted = {(k, e): row for k, e, row in zip(keys.tolist(), owners.tolist(), whole.tolist(), strict=True)}
    for name in set(DISPATCHERS) - {"local"}:
        for rank, answer in enumerate(answers):
            half = rank % 2
            for key, owner, left in answer[name]:
                assert left == wanted[key, owner][3 * half : 3 * half + 3], name
        # each row stands on both halves
        assert sum(len(answer[name]) for answer in answers) == 64


def test_the_mean_key_of_an_expert_is_that_of_its_gate_rows() -> None:
    experts = make()
    torch.testing.assert_close(experts.mean_keys(), experts.w1[:, 0].mean(dim=1))


def test_an_expert_activation_of_its_own_and_dropout_below_one() -> None:
    config = MoEConfig(num_experts=4, activation="relu", expert_dropout=0.4)
    assert (config.activation, config.expert_dropout) == ("relu", 0.4)
    with pytest.raises(Exception, match=r"--moe-expert-dropout 1.0: expected a number .*below 1"):
        MoEConfig(num_experts=4, expert_dropout=1.0)
