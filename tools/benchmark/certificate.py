"""The parallelism certificate on this machine's device: several processes share one card over gloo, and NCCL alone.

On the CPU the same over gloo. In bf16 and in float32, on the production path; what is allowed is measured first.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_moe.certify.certificate import Subject, certify
from megatron_moe.certify.combinations import layouts
from megatron_moe.certify.layouts import LAYOUTS, Layout
from megatron_moe.certify.tiny_run import Where
from tools.benchmark.results import Recorder, recorder

SPARSE: Mapping[str, Any] = {"router_type": "top_k", "aux_loss_coeff": 0.01, "shared_expert_intermediate_size": 8}
SUBJECTS = {
    "decoder-only": Subject(SPARSE),
    "dense": Subject({"num_experts": 0}),
}
FEW = ("micro-batches of 2", "EP 2 overlapped", "TP 2 with sequence parallelism and overlap", "CP 2 ring")


def chosen(ranks: Sequence[int], *, quick: bool) -> dict[str, Layout]:
    """Layouts of so many ranks."""
    known = {name: LAYOUTS[name] for name in FEW} if quick else layouts("quick")
    return {name: layout for name, layout in known.items() if layout.ranks in ranks}


def check(record: Recorder, dtype: str, where: Where, ranks: Sequence[int]) -> None:
    """Each layout's worst figure, as a share of what is allowed to it."""
    for family, subject in SUBJECTS.items():
        if record.seconds_left < 0:
            record.skip(f"{family} in {dtype} over {where.backend}", "no time left")
            continue
        tiny = Subject(subject.moe, subject.model, subject.encoder_moe, dtype)
        rows = certify(tiny, chosen(ranks, quick=record.quick), max_ranks=max(ranks), where=where)
        for row in rows:
            if row.refused is not None:
                continue
            shares = {kind: error / row.tolerances[kind] for kind, error in row.errors.items()}
            worst = max(shares, key=lambda kind: shares[kind])
            name = f"{family}, {dtype}, {where.backend}: {row.layout}"
            record.check(name, shares[worst], 1.0, f"{worst}, in shares of twice the spread of reordered sums")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this part."""
    record = recorder("certificate", argv, __doc__)
    torch.set_num_threads(1)
    device = record.device.type
    for dtype in ("bf16", "fp32"):
        if device == "cuda":
            check(record, dtype, Where("cuda", "nccl"), [1])
        check(record, dtype, Where(device, "gloo"), [1, 2] if device == "cpu" else [2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
