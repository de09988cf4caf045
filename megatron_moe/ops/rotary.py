"""Rotary position embedding, half layout: the first half of a head's dimensions turns with the second."""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (S, B, width/2), for positions (S, B).  [RoFormer, arXiv:2104.09864]

    Angles are wide whatever the dtype, as the models of the field were trained; only cos and sin are rounded to it.
    """
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
    frequency = (1.0 / base**exponent).to(torch.promote_types(dtype, torch.float32))
    angle = positions[..., None].to(frequency.dtype) * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """heads (S, B, ..., D): turn the first 2·width' of D dimensions, leave the rest."""
    cos, sin = angles
    half = cos.shape[-1]
    shape = (*cos.shape[:2], *(1,) * (heads.dim() - 3), half)
    cos, sin = cos.view(shape), sin.view(shape)
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
