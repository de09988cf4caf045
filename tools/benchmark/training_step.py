"""A whole training step of a small MoE model, and of a dense model with as many active parameters.

Tokens per second include gradient clipping and AdamW.  MFU: model FLOPs (training/flops.py) over the card's data-sheet
bf16 peak; beside it the same over the large product that was timed in the same rounds.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch, Stream
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine
from megatron_moe.training.flops import flops_per_token, formula_text, peak_flops
from tools.benchmark.ceilings import product_size, square_product
from tools.benchmark.results import Recorder, recorder
from tools.benchmark.timing import Clock, Timing, clock_for, measure


@dataclass(frozen=True)
class Model:
    """What is trained: layers, hidden width, heads, expert width, experts (0 = dense), choices, vocabulary, batch."""

    name: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    experts: int
    choices: int
    vocab: int
    length: int
    samples: int
    aux_loss: float = 0.01

    def dense_twin(self) -> "Model":
        """As many active parameters, none of them routed."""
        return replace(self, name=f"{self.name}, dense twin", ffn=self.ffn * self.choices, experts=0, aux_loss=0.0)

    @property
    def shape(self) -> dict[str, Any]:
        sizes = {"L": self.layers, "d": self.hidden, "f": self.ffn, "E": self.experts, "k": self.choices}
        return {"model": self.name, **sizes, "V": self.vocab, "S": self.length, "B": self.samples}

    def config(self, dtype: str) -> RunConfig:
        """The run as a user would write it."""
        sparse = {"num_experts": self.experts, "router_topk": self.choices, "aux_loss_coeff": self.aux_loss}
        return RunConfig.from_dict(
            {
                "model": {
                    "num_layers": self.layers,
                    "hidden_size": self.hidden,
                    "num_attention_heads": self.heads,
                    "ffn_hidden_size": self.ffn,
                    "vocab_size": self.vocab,
                },
                "moe": sparse if self.experts else {},
                "precision": {"dtype": dtype},
                "data": {"seq_length": self.length},
                "training": {
                    "global_batch_size": self.samples,
                    "micro_batch_size": self.samples,
                    "train_iters": 1000,
                },
                "optimizer": {"lr": 1e-4},
            }
        )


# OLMoE-1B-7B's layers, four of its sixteen, the vocabulary scaled so that the head keeps about its share of the FLOPs
CUDA_MODEL = Model("OLMoE 4 layers", 4, 2048, 16, 1024, 64, 8, 12544, 4096, 4)
CPU_MODEL = Model("small", 4, 256, 4, 256, 16, 2, 4096, 256, 4)
QUICK_MODEL = Model("tiny", 2, 32, 2, 16, 4, 2, 64, 16, 2)


def random_batch(model: Model, seed: int) -> Batch:
    """One microbatch of random tokens on the host, as the loader gives it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, model.vocab, (model.samples, model.length + 1), generator=generator)
    whole = torch.zeros(model.samples, model.length, dtype=torch.int32)
    positions = torch.arange(model.length).repeat(model.samples, 1)
    stream = Stream(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(), (whole == 0).float(), positions, whole)
    return Batch({"decoder": stream}, torch.arange(model.samples))


def trainer(model: Model, dtype: str, device: torch.device) -> tuple[Engine, Callable[[int], object]]:
    """The engine, and one step of it on the batch of the round."""
    engine = Engine(model.config(dtype), ParallelState.alone(), device, model.vocab)
    batches = [random_batch(model, seed) for seed in range(3)]
    return engine, lambda turn: engine.train_step(turn, [batches[turn % len(batches)]])


def report(model: Model, dtype: str, timing: Timing, ceiling: float, engine: Engine, record: Recorder) -> None:
    """Tokens per second and utilisation. ceiling: FLOP/s of the large product."""
    shape = {**model.shape, "dtype": dtype}
    tokens = model.samples * model.length
    rate = tokens / timing.median
    record.timed("training step", timing, shape)
    record.figure("tokens per second", rate, "tokens/s", shape, headline=True)
    flops = rate * flops_per_token(engine.config, model.vocab)
    record.figure("model FLOP/s", flops / 1e12, "TFLOP/s", shape, flops=formula_text())
    record.figure("of the large product", 100 * flops / ceiling, "%", shape, headline=True)
    peak = peak_flops(torch.cuda.get_device_name()) if record.device.type == "cuda" else None
    if peak is not None and dtype == "bf16":
        record.figure("MFU", 100 * flops / peak, "%", shape, headline=True, peak=peak)
    weights = sum(weight.numel() for stage in engine.stages for weight in stage.parameters())
    record.figure("parameters", weights, "", shape)


def run_model(model: Model, dtype: str, clock: Clock, record: Recorder) -> Timing | None:
    """Times the steps of one model; None when no time is left."""
    device = record.device
    if record.seconds_left < 0:
        record.skip(model.name, "no time left")
        return None
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    engine, step = trainer(model, dtype, device)
    size = product_size(device, record.quick)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    variants = {"step": step, "ceiling": square_product(size, kind, device)}
    budget = 0.2 if record.quick else 15.0
    timings = measure(variants, clock, seconds=min(budget, max(0.0, record.seconds_left)), most=30)
    report(model, dtype, timings["step"], 2.0 * size**3 / timings["ceiling"].median, engine, record)
    if on_cuda:
        shape = {**model.shape, "dtype": dtype}
        peak = torch.cuda.max_memory_allocated() / 2**30
        record.figure("peak memory", peak, "GiB", shape, headline=True, method="max_memory_allocated of the process")
    return timings["step"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this part."""
    record = recorder("training_step", argv, __doc__)
    torch.manual_seed(0)
    clock = clock_for(record.device)
    on_cuda = record.device.type == "cuda"
    model = QUICK_MODEL if record.quick else CUDA_MODEL if on_cuda else CPU_MODEL
    dtype = "bf16" if on_cuda else "fp32"
    sparse = run_model(model, dtype, clock, record)
    dense = run_model(model.dense_twin(), dtype, clock, record)
    if sparse and dense:
        shape = {**model.shape, "dtype": dtype}
        record.figure("speed over the dense twin", dense.median / sparse.median, "x", shape, headline=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
