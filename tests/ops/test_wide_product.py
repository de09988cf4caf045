"""Narrow factors, wide sums."""

import pytest
import torch

from megatron_moe.ops.wide_product import wide_product


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_as_wide_as_asked(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    left, right = torch.randn(2, 3, 300).to(dtype), torch.randn(2, 300, 4).to(dtype)
    found = wide_product(left, right, wide)
    assert found.dtype is wide
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=1e-4, atol=1e-4)


def test_a_wide_factor_stays_wide_beside_a_narrow_one() -> None:
    left, right = torch.randn(2, 3, 5), torch.randn(2, 5, 4).bfloat16()
    assert torch.equal(wide_product(left, right, torch.float32), left @ right.float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_sum_wide(dtype: torch.dtype) -> None:
    left = torch.randn(2, 64, 512, device="cuda").to(dtype)
    right = torch.randn(2, 32, 512, device="cuda").to(dtype).transpose(1, 2)
    found = wide_product(left, right, torch.float32)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=1e-4, atol=1e-3)
    mixed = wide_product(left.float(), right, torch.float32)
    assert torch.equal(mixed, found)
