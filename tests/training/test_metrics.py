"""Sums over ranks against sums by hand."""

from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from megatron_moe.moe.plan import AuxLoss, RoutingReport
from megatron_moe.parallel.grid import Grid
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.metrics import MetricsReducer, StepMetrics, summarise_routing
from megatron_moe.training.objective import GlobalCounts, StreamCounts, TokenLosses
from megatron_moe.training.step import Findings
from tests.training.samples import layer_stats

CPU = torch.device("cpu")


def report(layer: int, requested: list[int], balance: float, z: float, *, weight: float = 0.01) -> RoutingReport:
    losses = {
        "load_balance_loss": AuxLoss(torch.tensor(balance), weight),
        "z_loss": AuxLoss(torch.tensor(z), weight, per="token"),
    }
    stats = {"requested": torch.tensor(requested), "tokens": torch.tensor(sum(requested))}
    return RoutingReport(layer, losses, stats)


def plain(metrics: StepMetrics) -> dict[str, Any]:
    layers = {layer: {name: value.tolist() for name, value in stats.items()} for layer, stats in metrics.layers.items()}
    return {"loss": metrics.loss, "aux": metrics.aux_losses, "layers": layers}


def test_one_rank_by_hand() -> None:
    findings = Findings()
    for share in (6.0, 4.0):
        findings.add_losses(TokenLosses(torch.tensor(share), None))
    findings.add_report(report(1, [3, 1], 2.0, 8.0))
    findings.add_report(report(3, [2, 2], 3.0, 4.0))
    findings.add_report(report(1, [0, 4], 5.0, 4.0))
    found = plain(MetricsReducer(ParallelState.alone(), CPU).reduce(findings, GlobalCounts(5.0, StreamCounts(8, 4, 4))))
    assert found["loss"] == 2.0  # 10 nats over 5 tokens
    assert found["aux"] == {"load_balance_loss": 2.5, "z_loss": 2.0}  # (2+3+5) / 4 groups, (8+4+4) / 8 tokens
    assert list(found["layers"]) == [1, 3]
    assert found["layers"][1]["requested"] == [3, 5]
    assert found["layers"][1]["tokens"] == 8
    assert found["layers"][3]["requested"] == [2, 2]


def test_a_dense_model_and_a_batch_of_padding_only() -> None:
    found = MetricsReducer(ParallelState.alone(), CPU).reduce(Findings(), GlobalCounts(0.0, StreamCounts(0, 0, 0)))
    assert plain(found) == {"loss": 0.0, "aux": {}, "layers": {}}
    assert summarise_routing(found.layers) is None


def reduce_twice(rank: int, world_size: int, dense: bool) -> list[dict[str, Any]]:
    """Pipeline 2 x data 2 x tensor 2: layer 0 with 2 experts in the first stage, layers 1 and 3 with 3 in the last."""
    state = ParallelState.distributed(Grid(world_size, tp=2, pp=2))
    reducer = MetricsReducer(state, CPU)
    found = []
    for step in (1, 2):
        findings = Findings()
        if state.pp.is_last:
            findings.add_losses(TokenLosses(torch.tensor(step * (1.0 + state.dp.rank)), None))
        for layer in () if dense else (1, 3) if state.pp.is_last else (0,):
            counts = [step, rank, 1] if layer else [rank, 10]
            findings.add_report(report(layer, counts, float(step), 1.0))
        found.append(plain(reducer.reduce(findings, GlobalCounts(2.0, StreamCounts(16, 4, 4)))))
    return found


def test_eight_ranks_in_two_stages_by_hand() -> None:
    results = run_on_ranks(8, reduce_twice, False)
    assert all(result == results[0] for result in results)
    for step, found in zip((1, 2), results[0], strict=True):
        # both tensor-parallel ranks hold the same loss: 1·step and 2·step of the two data-parallel ranks
        assert found["loss"] == 3.0 * step / 2.0
        # three layers with four ranks each; z-loss over tokens
        assert found["aux"] == {"load_balance_loss": 12.0 * step / 4, "z_loss": 12.0 / 16}
        assert found["layers"][0]["requested"] == [0 + 1 + 2 + 3, 40]
        assert found["layers"][1]["requested"] == [4 * step, 4 + 5 + 6 + 7, 4]
        assert found["layers"][3] == found["layers"][1]
        assert list(found["layers"]) == [0, 1, 3]


def test_a_dense_pipeline_brings_a_loss_and_nothing_else() -> None:
    results = run_on_ranks(4, reduce_twice, True)
    # one data-parallel rank
    assert results == [[{"loss": step / 2.0, "aux": {}, "layers": {}} for step in (1.0, 2.0)]] * 4


def test_summary_by_hand() -> None:
    even = layer_stats([4, 4, 4, 4], [4, 4, 4, 4], tokens=8, unserved=0, entropy=8.0)
    skewed = {3: layer_stats([12, 4, 0, 0], [6, 4, 0, 0], tokens=8, unserved=2, entropy=2.0)[1]}
    found = summarise_routing({**even, **skewed})
    assert found is not None
    assert found.max_violation == pytest.approx(12 / 4 - 1)
    assert found.drop_rate == pytest.approx(6 / 32)
    assert found.unserved_rate == pytest.approx(2 / 16)
    assert found.entropy == pytest.approx(10 / 16)
    assert found.dead_experts == 2


def test_summary_of_balance_is_zero_and_of_no_tokens_too() -> None:
    even = summarise_routing(layer_stats([2, 2], [2, 2], 2, 0, 0.0))
    idle = summarise_routing(layer_stats([0, 0], [0, 0], 0, 0, 0.0))
    assert even is not None and idle is not None
    assert (even.max_violation, even.drop_rate, even.dead_experts) == (0.0, 0.0, 0)
    assert (idle.max_violation, idle.unserved_rate, idle.entropy, idle.dead_experts) == (0.0, 0.0, 0.0, 2)
