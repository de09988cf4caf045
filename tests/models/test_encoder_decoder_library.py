"""T5 v1.1, T5 and Switch Transformers of the library: the same weights give the same logits, loss and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.layers.context import ForwardContext
from megatron_moe.layers.loss import vocabulary_cross_entropy
from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.models.gpt import GPTStage
from megatron_moe.models.whole import plain_context
from megatron_moe.parallel.state import ParallelState

transformers = pytest.importorskip("transformers")

STATE = ParallelState.alone()
VOCAB, HIDDEN, HEADS, WIDTH, INNER, EXPERTS = 83, 32, 4, 6, 40, 4
ENCODER, DECODER = 2, 4
SAMPLES, SOURCE, TARGET = 3, 21, 13
# both compute in float32, in another order
TOLERANCE = 1e-5

Link = tuple[str, str, float]  # our name, theirs, theirs / ours

SIZES = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": WIDTH,
    "d_ff": INNER,
    "num_heads": HEADS,
    "num_layers": ENCODER,
    "num_decoder_layers": DECODER,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
SPARSE = {
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 2,
    "num_experts": EXPERTS,
    "router_jitter_noise": 0.0,
}
MOE = {"num_experts": EXPERTS, "router_type": "switch", "layer_freq": "2"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "t5 v1.1": (
        "T5",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"activation": "geglu_tanh", "untie_embeddings_and_output_weights": True},
    ),
    "t5": ("T5", {"feed_forward_proj": "relu"}, {"activation": "relu"}),
    "switch": ("SwitchTransformers", {**SPARSE, "expert_capacity": 64}, {"activation": "relu"}),
    # places for 4 tokens of an expert in each sequence, of either length
    "switch with drops": ("SwitchTransformers", {**SPARSE, "expert_capacity": 4}, {"activation": "relu"}),
}


def library_model(name: str) -> Any:
    word, keys, _ = CASES[name]
    config = getattr(transformers, f"{word}Config")(**SIZES, **keys)
    torch.manual_seed(1)
    model = getattr(transformers, f"{word}ForConditionalGeneration")(config).eval()
    if keys.get("tie_word_embeddings") is False:
        # 5.x ties every head of a new model: give it its own, and the scale of an untied one
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        model.config.scale_decoder_outputs = False
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            centre = 1.0 if "norm" in key else 0.0
            parameter.copy_(centre + 0.15 * torch.randn_like(parameter))
    return model


def our_model(name: str) -> GPTStage:
    _, keys, changes = CASES[name]
    moe = {}
    if "num_experts" in keys:
        moe = {"moe": _places(keys, TARGET), "encoder_moe": _places(keys, SOURCE)}
    run = RunConfig.from_dict(
        {
            "model": {
                "num_layers": DECODER,
                "encoder_num_layers": ENCODER,
                "hidden_size": HIDDEN,
                "num_attention_heads": HEADS,
                "kv_channels": WIDTH,
                "ffn_hidden_size": INNER,
                "vocab_size": VOCAB,
                "make_vocab_size_divisible_by": 1,
                "position_embedding_type": "relative",
                "relative_attention_num_buckets": 8,
                "relative_attention_max_distance": 16,
                "norm_epsilon": 1e-6,
                **changes,
            },
            **moe,
            "data": {"seq_length": TARGET},
            "training": {"global_batch_size": 1, "train_iters": 1},
            "optimizer": {"lr": 1.0},
        }
    )
    (stage,) = stages = build_stages(gpt_spec(run, VOCAB), STATE)
    initialise_stages(stages, STATE, 0, torch.device("cpu"))
    return stage


def _places(keys: dict[str, Any], length: int) -> dict[str, Any]:
    """The library's absolute number of places as a factor of an even split."""
    if keys["expert_capacity"] >= length:
        return dict(MOE)
    factor = keys["expert_capacity"] * EXPERTS / length
    return {**MOE, "expert_capacity_factor": factor, "capacity_rounding": "round"}


def linked(ours: GPTStage, theirs: Any) -> list[Link]:
    """Every parameter of both."""
    pairs: list[Link] = [
        ("embedding.weight", "shared.weight", 1.0),
        ("encoder_norm.weight", "encoder.final_layer_norm.weight", 1.0),
        ("final_norm.weight", "decoder.final_layer_norm.weight", 1.0),
    ]
    if not ours.spec.tied:
        pairs.append(("output.weight", "lm_head.weight", 1.0))
    for stream, first in (("encoder", 0), ("decoder", ENCODER)):
        bias = f"{stream}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        pairs.append((f"relative_bias.{stream}.weight", bias, 1.0))
        for layer in range(ENCODER if stream == "encoder" else DECODER):
            pairs += _layer(ours, f"layers.{first + layer}", f"{stream}.block.{layer}.layer", stream)
    return pairs


def _layer(ours: GPTStage, mine: str, block: str, stream: str) -> list[Link]:
    last = 1 if stream == "encoder" else 2
    scale = WIDTH**-0.5  # the library does not divide scores by the root of the width
    attention = f"{block}.0.SelfAttention"
    pairs: list[Link] = [
        (f"{mine}.attention_norm.weight", f"{block}.0.layer_norm.weight", 1.0),
        (f"{mine}.attention.qkv[0]", f"{attention}.q.weight", scale),
        (f"{mine}.attention.qkv[1]", f"{attention}.k.weight", 1.0),
        (f"{mine}.attention.qkv[2]", f"{attention}.v.weight", 1.0),
        (f"{mine}.attention.output", f"{attention}.o.weight", 1.0),
        (f"{mine}.mlp_norm.weight", f"{block}.{last}.layer_norm.weight", 1.0),
    ]
    if stream == "decoder":
        across = f"{block}.1.EncDecAttention"
        pairs += [
            (f"{mine}.cross_norm.weight", f"{block}.1.layer_norm.weight", 1.0),
            (f"{mine}.cross_attention.q", f"{across}.q.weight", scale),
            (f"{mine}.cross_attention.kv[0]", f"{across}.k.weight", 1.0),
            (f"{mine}.cross_attention.kv[1]", f"{across}.v.weight", 1.0),
            (f"{mine}.cross_attention.output", f"{across}.o.weight", 1.0),
        ]
    names = {name for name, _ in ours.named_parameters()}
    if f"{mine}.mlp.router.weight" in names:
        mlp = f"{block}.{last}.mlp"
        pairs.append((f"{mine}.mlp.router.weight", f"{mlp}.router.classifier.weight", 1.0))
        for number in range(EXPERTS):
            expert = f"{mlp}.experts.expert_{number}"
            pairs.append((f"{mine}.mlp.experts.w1<{number}>", f"{expert}.wi.weight", 1.0))
            pairs.append((f"{mine}.mlp.experts.w2<{number}>", f"{expert}.wo.weight", 1.0))
        return pairs
    mlp = f"{block}.{last}.{'mlp' if ours.spec.layers[1].moe is not None else 'DenseReluDense'}"
    branches = ["wi_0", "wi_1"] if ours.get_parameter(f"{mine}.mlp.w1").shape[0] == 2 else ["wi"]
    for number, branch in enumerate(branches):
        pairs.append((f"{mine}.mlp.w1<{number}>", f"{mlp}.{branch}.weight", 1.0))
    return [*pairs, (f"{mine}.mlp.w2", f"{mlp}.wo.weight", 1.0)]


def place(tensors: dict[str, Tensor], name: str) -> Tensor:
    """x, x[1] along dim 1 of heads' projections, or x<3> along dim 0."""
    if name.endswith("]"):
        stem, number = name[:-1].split("[")
        return tensors[stem][:, int(number) : int(number) + 1]
    if name.endswith(">"):
        stem, number = name[:-1].split("<")
        return tensors[stem][int(number)]
    return tensors[name]


def copy_weights(ours: GPTStage, theirs: Any) -> None:
    mine = {name: parameter.data for name, parameter in ours.named_parameters()}
    given = dict(theirs.named_parameters(remove_duplicate=False))
    for name, source, scale in linked(ours, theirs):
        target = place(mine, name)
        target.copy_(given[source].data.reshape(target.shape) / scale)


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(1, VOCAB, (SAMPLES, length), generator=torch.Generator().manual_seed(seed))


def our_answer(stage: GPTStage, source: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """Logits (B, S, V), and how many tokens found no place."""
    plain: ForwardContext = plain_context(target)
    output = stage({}, replace(plain, source=plain_context(source).view))
    lost = sum(report.stats["requested"].sum() - report.stats["tokens_per_expert"].sum() for report in output.reports)
    return output.tensors["logits"].transpose(0, 1), int(lost)


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_are_those_of_the_library(name: str) -> None:
    theirs, ours = library_model(name), our_model(name)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(torch.nan)  # whatever is not copied shows
    copy_weights(ours, theirs)
    source, target, labels = tokens(SOURCE, 2), tokens(TARGET, 3), tokens(TARGET, 4)
    wanted = theirs(input_ids=source, decoder_input_ids=target, use_cache=False).logits
    found, lost = our_answer(ours, source, target)
    assert (lost > 10) == (name == "switch with drops")
    size = float(wanted.detach().abs().max())
    assert size > 0.3
    assert float((found - wanted).detach().abs().max()) < TOLERANCE * size
    their_loss = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), labels.flatten())
    our_loss = vocabulary_cross_entropy(found, labels, VOCAB, STATE.tp).mean()
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=TOLERANCE)
    their_loss.backward()
    our_loss.backward()
    _check_gradients(ours, theirs)


def _check_gradients(ours: GPTStage, theirs: Any) -> None:
    mine = {key: _gradient(parameter) for key, parameter in ours.named_parameters()}
    given = {key: _gradient(parameter) for key, parameter in theirs.named_parameters(remove_duplicate=False)}
    largest = max(float(gradient.abs().max()) for gradient in given.values())
    for name, source, scale in linked(ours, theirs):
        # a weight that is divided by scale has a gradient that is multiplied by it
        wanted = given[source] * scale
        found = place(mine, name).reshape(wanted.shape)
        error = float((found - wanted).abs().max())
        assert error < TOLERANCE * (float(wanted.abs().max()) + 1e-2 * largest), name


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
