"""Products of matrices, some of them narrow, whose sums are wide."""

import torch
from torch import Tensor


def wide_product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """(n, R, K) x (n, K, C) -> (n, R, C) of dtype `wide`, summed in it.   No gradient.

    Each factor has dtype `wide` or a narrower one. Where tensor cores do the work, a wide factor beside a narrow one
    is rounded to that.
    """
    narrow = left.dtype if left.dtype != wide else right.dtype
    if left.is_cuda and narrow in (torch.bfloat16, torch.float16):
        # torch has this form on CUDA only
        return torch.bmm(left.to(narrow), right.to(narrow), out_dtype=wide)
    return torch.bmm(left.to(wide), right.to(wide))
