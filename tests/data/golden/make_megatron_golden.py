"""Writes the .bin/.idx pairs here with megatron-core's own builder, from corpora.json (lists of sequences).

pip install megatron-core==0.16.1 && python tests/data/golden/make_megatron_golden.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write(prefix: Path, *, dtype: str, documents: list[list[list[int]]]) -> None:
    """One corpus, with both of the builder's ways to add a document."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for number, document in enumerate(documents):
        if number % 2:
            for sequence in document:
                builder.add_item(torch.tensor(sequence))
            builder.end_document()
        else:
            tokens = [token for sequence in document for token in sequence]
            builder.add_document(tokens, [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")


def main() -> int:
    """Writes every corpus."""
    folder = Path(__file__).parent
    for name, corpus in json.loads((folder / "corpora.json").read_text()).items():
        write(folder / name, dtype=corpus["dtype"], documents=corpus["documents"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
