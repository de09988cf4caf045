"""A tiny MoE model on the device against the same model in float64 on the CPU: one pass, and one training step.

Rounding may turn a near tie between two experts, and then everything after it differs. So the float64 run's choices are
recorded and replayed on the device; how many the device would have made otherwise is checked apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch, Stream
from megatron_moe.layers.loss import vocabulary_cross_entropy
from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.models.gpt import GPTStage
from megatron_moe.models.whole import plain_context
from megatron_moe.moe.routers.top_k import best_experts
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine
from tools.benchmark.results import Recorder

VOCAB, LENGTH, SAMPLES = 61, 32, 4

# bf16: roundings of 2^-9 through four layers forward and back add up to one or two percent, most in small gradients;
# fp32: the same with 2^-24, and sums in another order
MODEL_TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
# Adam's first update is the rate with the gradient's sign: a gradient within rounding of zero may take the other one.
# A share p of such elements makes an error of 2 sqrt(p)
UPDATE_TOLERANCE = {"fp32": 3e-2, "bf16": 0.5}
# choices that float64 makes by a margin below the rounding of the logits
TURNED_TOLERANCE = {"fp32": 0.005, "bf16": 0.1}


def tiny_config(dtype: str) -> RunConfig:
    """Four layers, every second one sparse, tied weights, grouped queries, both auxiliary losses."""
    return RunConfig.from_dict(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 96,
                "vocab_size": VOCAB,
                "make_vocab_size_divisible_by": 8,
                "init_method_std": 0.1,
            },
            "moe": {
                "num_experts": 8,
                "layer_freq": "2",
                "ffn_hidden_size": 48,
                "aux_loss_coeff": 0.01,
                "z_loss_coeff": 0.001,
            },
            "precision": {"dtype": dtype},
            "data": {"seq_length": LENGTH},
            "training": {"global_batch_size": SAMPLES, "micro_batch_size": SAMPLES, "train_iters": 10},
            "optimizer": {"lr": 0.01},
        }
    )


class Choices:
    """Stands in for a router's choice: records what is chosen, or gives what was recorded and counts differences."""

    def __init__(self, recorded: list[Tensor] | None = None) -> None:
        self.made: list[Tensor] = []
        self.recorded = recorded
        self.turned = 0

    def __call__(self, logits: Tensor, choices: int) -> Tensor:
        chosen = best_experts(logits, choices)
        if self.recorded is not None:
            given = self.recorded[len(self.made)].to(chosen.device)
            self.turned += int((chosen.sort(dim=1).values != given.sort(dim=1).values).any(dim=1).sum())
            chosen = given
        self.made.append(chosen)
        return chosen

    @property
    def turned_share(self) -> float:
        """Tokens whose experts the device would have chosen otherwise."""
        return self.turned / sum(chosen.shape[0] for chosen in self.made)


@contextmanager
def choosing(choices: Choices) -> Iterator[None]:
    """top_k routers choose that way."""
    with mock.patch("megatron_moe.moe.routers.top_k.best_experts", choices):
        yield


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The worst ||a - b|| / (||b|| + 1e-3 x the largest norm) over tensors: one that is almost zero counts little."""
    floor = 1e-3 * max(float(value.norm()) for value in wanted.values())
    errors = [
        (found[name].detach().double().cpu() - value).norm() / (value.norm() + floor) for name, value in wanted.items()
    ]
    return float(torch.stack(errors).max())  # max keeps NaN


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    """(B, S) each; the same numbers everywhere."""
    drawn = torch.randint(0, VOCAB, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def build(dtype: str, device: torch.device) -> GPTStage:
    """The whole model in one stage."""
    state = ParallelState.alone()
    stages = build_stages(gpt_spec(tiny_config(dtype), VOCAB), state)
    initialise_stages(stages, state, 7, device)
    return stages[0]


def forward_backward(stage: GPTStage, choices: Choices) -> tuple[float, dict[str, Tensor]]:
    """The loss with its auxiliary losses, and every gradient with the logits, by name."""
    device = next(stage.parameters()).device
    tokens, labels = (tensor.to(device) for tensor in tokens_and_labels())
    with choosing(choices):
        output = stage({}, replace(plain_context(tokens), train=True))
        logits = output.tensors["logits"]
        losses = vocabulary_cross_entropy(logits, labels.t(), VOCAB, ParallelState.alone().tp)
        shares = [loss.share * loss.weight for report in output.reports for loss in report.aux_losses.values()]
        total = losses.mean() + sum(shares) / SAMPLES
        total.backward()
    found = {name: weight.grad for name, weight in stage.named_parameters() if weight.grad is not None}
    return float(total.detach()), found | {"logits": logits[..., :VOCAB]}


def check_model(dtype: str, record: Recorder) -> None:
    """Logits, loss and every gradient of one pass, from the same weights."""
    here, wide = build(dtype, record.device), build("fp64", torch.device("cpu"))
    with torch.no_grad():
        for name, weight in here.named_parameters():
            wide.get_parameter(name).copy_(weight)
    recorded = Choices()
    wanted_loss, wanted = forward_backward(wide, recorded)
    replayed = Choices(recorded.made)
    found_loss, found = forward_backward(here, replayed)
    missing = set(wanted) ^ set(found)
    if missing:
        raise ValueError(f"gradients of one run only: {sorted(missing)}")
    loss_error = abs(found_loss - wanted_loss) / abs(wanted_loss)
    record.check(f"tiny model {dtype}: loss", loss_error, LOSS_TOLERANCE[dtype], "a mean over 128 tokens")
    error = largest_error(found, {name: value.detach() for name, value in wanted.items()})
    why = "rounding through four layers and back, same routing; the worst tensor"
    record.check(f"tiny model {dtype}: logits and gradients", error, MODEL_TOLERANCE[dtype], why)
    why = "tokens whose experts rounding alone would change"
    record.check(f"tiny model {dtype}: choices turned", replayed.turned_share, TURNED_TOLERANCE[dtype], why)


def make_batch() -> Batch:
    """One microbatch, one sample of it ending in padding."""
    tokens, labels = tokens_and_labels()
    segments = torch.zeros(SAMPLES, LENGTH, dtype=torch.int32)
    segments[0, LENGTH - 5 :] = -1
    positions = torch.arange(LENGTH).repeat(SAMPLES, 1)
    stream = Stream(tokens, labels, (segments >= 0).float(), positions, segments)
    return Batch({"decoder": stream}, torch.arange(SAMPLES))


def train_once(dtype: str, device: torch.device, choices: Choices) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and how every weight moved in one step of the engine."""
    engine = Engine(tiny_config(dtype), ParallelState.alone(), device, VOCAB)
    weights = {name: weight for stage in engine.stages for name, weight in stage.named_parameters()}
    before = {name: weight.detach().double().cpu().clone() for name, weight in weights.items()}
    with choosing(choices):
        result = engine.train_step(0, [make_batch()])
    moved = {name: weight.detach().double().cpu() - before[name] for name, weight in weights.items()}
    return result.metrics.loss, result.grad_norm, moved


def check_training_step(dtype: str, record: Recorder) -> None:
    """Forward, backward, clipping and AdamW as training does them."""
    recorded = Choices()
    loss, norm, moved = train_once("fp64", torch.device("cpu"), recorded)
    found_loss, found_norm, found_moved = train_once(dtype, record.device, Choices(recorded.made))
    # the first weights are rounded too, so the loss differs by more than the arithmetic
    record.check(
        f"training step {dtype}: loss", abs(found_loss - loss) / loss, LOSS_TOLERANCE[dtype], "rounded first weights"
    )
    why = "sum of squares over all gradients"
    record.check(f"training step {dtype}: gradient norm", abs(found_norm - norm) / norm, MODEL_TOLERANCE[dtype], why)
    difference = sum(float((found_moved[name] - value).square().sum()) for name, value in moved.items())
    error = (difference / sum(float(value.square().sum()) for value in moved.values())) ** 0.5
    why = "Adam's first update has the gradient's sign, which rounding turns where the gradient is almost zero"
    record.check(f"training step {dtype}: update of the weights", error, UPDATE_TOLERANCE[dtype], why)
