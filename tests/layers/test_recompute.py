"""What is not kept for the backward pass is made again there, and gives the same gradients."""

import pytest
import torch
from torch import Tensor

from megatron_moe.layers.recompute import Recomputation, remade, run_again


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (Recomputation(), [("a", False), ("b", False), ("c", False)]),
        (Recomputation(1), [("a", True), ("b", True), ("c", True)]),
        (Recomputation(2), [("ab", True), ("c", True)]),
        (Recomputation(1, first=2), [("a", True), ("b", True), ("c", False)]),
        (Recomputation(1, first=9), [("a", True), ("b", True), ("c", True)]),
    ],
)
def test_layers_of_a_stage_run_again_in_chunks(rule: Recomputation, wanted: list[tuple[str, bool]]) -> None:
    assert [("".join(names), again) for names, again in rule.chunks(["a", "b", "c"])] == wanted


def test_a_remade_tensor_is_not_kept_and_its_gradient_is_the_same() -> None:
    torch.manual_seed(0)
    source = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    made: list[Tensor] = []

    def make() -> Tensor:
        made.append(source.exp())
        return made[-1]

    between = source.exp()
    with remade(between, make):
        out = between @ weight.t()
    found = torch.autograd.grad(out.square().sum(), (source, weight))
    assert len(made) == 1 and not made[0].requires_grad
    plain = source.exp() @ weight.t()
    wanted = torch.autograd.grad(plain.square().sum(), (source, weight))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


def test_what_is_remade_is_what_the_backward_pass_uses() -> None:
    source = torch.ones(2, 2, requires_grad=True)
    weight = torch.ones(2, 2, requires_grad=True)
    between = source * 1.0
    with remade(between, lambda: between * 3.0):
        out = between @ weight
    out.sum().backward()
    assert torch.equal(weight.grad, torch.full((2, 2), 6.0))  # type: ignore[arg-type]


def test_other_tensors_are_kept_as_they_are() -> None:
    first, second = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    with remade(torch.randn(3, 3), lambda: torch.full((3, 3), torch.nan)):
        out = first @ second
    out.sum().backward()
    assert first.grad is not None and first.grad.isfinite().all()


def test_a_function_runs_again_for_its_gradient() -> None:
    calls = []

    def double(value: Tensor) -> Tensor:
        calls.append(1)
        return value.square() * 2

    value = torch.tensor([1.5], requires_grad=True)
    run_again(double, value).sum().backward()
    assert len(calls) == 2 and value.grad == 6.0
