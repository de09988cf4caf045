"""The exported model in transformers gives the logits that this project gives."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from megatron_moe.config.run import RunConfig
from megatron_moe.data.build import build_datasets
from megatron_moe.data.tokenizer import build_tokenizer
from megatron_moe.models.load import load_model
from megatron_moe.models.whole import whole_logits


@dataclass(frozen=True)
class Comparison:
    """How near the two libraries are."""

    family: str
    num_tokens: int
    relative_error: float  # largest difference / largest logit


def compare_with_transformers(checkpoint: Path, folder: Path, config: RunConfig) -> Comparison:
    """Both models on a validation sample, in float32 on the CPU.

    Raises RuntimeError if an expert was not hit, or if the logits differ by more than 1e-5 of their scale.
    """
    datasets = build_datasets(config, build_tokenizer(config.data, config.model.vocab_size))
    valid = datasets["valid"]
    if valid is None:
        raise RuntimeError("the corpus is too small for a validation split")
    batch = valid.get(range(2))
    model = load_model(checkpoint, dtype=torch.float32)
    logits, reports = whole_logits(model.stages[0], batch.decoder.tokens)
    for report in reports:
        idle = (report.stats["requested"] == 0).nonzero().flatten().tolist()
        if idle:
            raise RuntimeError(f"layer {report.layer}: no token of the comparison went to experts {idle}")
    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = theirs(batch.decoder.tokens).logits
    error = float((logits - expected).abs().max() / expected.abs().max())
    if error > 1e-5:
        raise RuntimeError(f"logits differ from transformers' by {error:.1e} of their scale; 1e-5 was expected at most")
    return Comparison(type(theirs).__name__, batch.decoder.tokens.numel(), error)
