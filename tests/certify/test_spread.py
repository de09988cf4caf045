"""What is called another order of the same sums is that, and its spread is the tolerance."""

import pytest
import torch

from megatron_moe.certify.certificate import Subject
from megatron_moe.certify.spread import CutProducts, run_ways, tolerances, ways
from megatron_moe.certify.tiny_model import GLOBAL_BATCH
from megatron_moe.certify.tiny_run import CPU, TOLERANCE, Outcome, outcome_of


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_cut_products_are_the_same_products(parts: int) -> None:
    left, right = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    total, out = torch.randn(5, 4, dtype=torch.float64), torch.empty(5, 4, dtype=torch.float64)
    wanted = left @ right
    with CutProducts(parts):
        found = [left @ right, torch.addmm(total, left, right) - total, total.clone().addmm_(left, right) - total]
        torch.mm(left, right, out=out)
        stacked = torch.bmm(left[None], right[None])[0]
    for answer in (*found, out, stacked):
        torch.testing.assert_close(answer, wanted, rtol=1e-13, atol=1e-13)


def test_parts_are_rounded_each_and_added_backwards() -> None:
    left, right = torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(3, 1, dtype=torch.bfloat16)
    left[0] = torch.tensor([256.0, 1.0, 1.0])
    with CutProducts(3):
        assert (left @ right).item() == 258.0  # (1 + 1) + 256; forwards, 256 + 1 would be 256 and again
    left[0] = torch.tensor([1.0, 1.0, 256.0])
    with CutProducts(3):
        assert (left @ right).item() == 256.0


@pytest.mark.parametrize("group", [1, 2, 4])
def test_every_way_holds_each_sample_once_and_routing_groups_together(group: int) -> None:
    for way in ways(group):
        assert sorted(way.order) == list(range(GLOBAL_BATCH)) and way.micro_batch_size % group == 0
        for start in range(0, GLOBAL_BATCH, group):
            some = way.order[start : start + group]
            assert list(some) == list(range(some[0], some[0] + group)) and some[0] % group == 0


def test_in_float64_all_ways_agree_and_in_float32_they_differ() -> None:
    def spread(dtype: str) -> dict[str, float]:
        subject = Subject({"router_type": "st_moe", "aux_loss_coeff": 0.01, "routing_group_samples": 2}, dtype=dtype)
        runs = run_ways(0, 1, subject.config({}, 2), ways(2), CPU)
        return tolerances([outcome_of([run]) for run in runs], dtype)

    wide, narrow = spread("fp64"), spread("fp32")
    assert max(wide.values()) < TOLERANCE
    assert all(2.0**-21 < narrow[kind] < 1e-2 for kind in narrow)
    assert all(narrow[kind] > 1e3 * wide[kind] for kind in narrow)


def test_the_tolerance_is_twice_the_largest_distance_between_any_two() -> None:
    runs = [Outcome([1.0], [{}], [norm], {}, {}) for norm in (1.0, 1.1, 0.9)]
    for run in runs:
        run.gradients["w"] = run.weights["w"] = torch.ones(2).numpy()
    found = tolerances(runs, "fp32")
    assert found["gradient norm"] == pytest.approx(2 * 0.2 / 0.9)
    assert found["loss"] == 8 * torch.finfo(torch.float32).eps
