"""What the machine can do at best: large matrix products and a copy, on random data."""

import sys
from collections.abc import Sequence

import torch

from tools.benchmark.results import Recorder, recorder
from tools.benchmark.timing import Variant, clock_for, measure

INPUT_SETS = 3


def product_size(device: torch.device, quick: bool) -> int:
    """The edge of the square product that stands for the device's arithmetic."""
    if device.type == "cuda":
        return 2048 if quick else 8192
    return 128 if quick else 1024


def square_product(size: int, dtype: torch.dtype, device: torch.device) -> Variant:
    """size^3 multiplications and as many additions; the output is written in place."""
    left = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(INPUT_SETS)]
    right = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(INPUT_SETS)]
    out = torch.empty(size, size, device=device, dtype=dtype)
    return lambda turn: torch.mm(left[turn % INPUT_SETS], right[turn % INPUT_SETS].t(), out=out)


def copy(size: int, device: torch.device) -> Variant:
    """size bytes read and as many written."""
    sources = [torch.randn(size // 4, device=device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    return lambda turn: target.copy_(sources[turn % 2])


def run(record: Recorder) -> None:
    """All ceilings, interleaved."""
    device, quick = record.device, record.quick
    clock = clock_for(device)
    size = product_size(device, quick)
    copied = (1 << 32 if device.type == "cuda" else 1 << 28) >> (6 if quick else 0)
    variants: dict[str, Variant] = {
        "product bf16": square_product(size, torch.bfloat16, device),
        "product fp32": square_product(size, torch.float32, device),
        "copy": copy(copied, device),
    }
    timings = measure(variants, clock, seconds=min(10.0, record.seconds_left) / (20 if quick else 1))
    for name, timing in timings.items():
        how = {"lowest_ms": timing.lowest * 1e3, "highest_ms": timing.highest * 1e3}
        more = {**how, "iterations": timing.iterations, "method": timing.method, "headline": True}
        if name == "copy":
            record.figure(
                "copy", 2 * copied / timing.median / 1e9, "GB/s", {"bytes": copied}, counts="read + written", **more
            )
        else:
            dtype = name.split()[1]
            rate = 2 * size**3 / timing.median / 1e12
            record.figure("product", rate, "TFLOP/s", {"M=N=K": size, "dtype": dtype}, flops="2 M N K", **more)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this part."""
    run(recorder("ceilings", argv, __doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
