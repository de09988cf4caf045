"""What recomputation keeps less of, what it refuses, and that nothing is counted twice."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_moe.certify.tiny_model import VOCAB, samples, tiny_config
from megatron_moe.config.errors import ConfigError
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine, StepResult

MODEL = {"hidden_size": 64, "ffn_hidden_size": 128}
MOE = {"router_type": "switch", "aux_loss_coeff": 0.01, "ffn_hidden_size": 64}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def engine_of(parallel: dict[str, Any], moe: dict[str, Any] | None = None) -> Engine:
    config = tiny_config({**MOE, **(moe or {})}, parallel, MODEL, 4)
    return Engine(config, ParallelState.alone(), torch.device("cpu"), VOCAB)


def kept_bytes(parallel: dict[str, Any], moe: dict[str, Any] | None = None) -> int:
    """Allocated in a forward pass and not freed in it."""
    engine = engine_of(parallel, moe)
    program, _ = engine._program([samples(range(4))], engine._random, engine.objective, train=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        played = program.forward(0, 0, {}, split=False)
    assert played.losses
    return sum(event.self_cpu_memory_usage for event in found.events())


def test_each_part_keeps_less_and_whole_layers_keep_least() -> None:
    everything = kept_bytes({})
    tokens, hidden = 4 * 8, 64
    # at the least: outputs of most norms; inner rows of two MLPs and of the experts
    saved = {
        "core_attn": 0,
        "layernorm": 5 * tokens * hidden * 8,
        "mlp": 2 * tokens * 128 * 3 * 8,
        "moe": 2 * tokens * 64 * 3 * 8,
        "moe_act": 2 * tokens * 64 * 8,
    }
    for module, least in saved.items():
        assert kept_bytes(selective(module)) < everything - least, module
    together = kept_bytes(selective(*saved))
    assert together < min(kept_bytes(selective(module)) for module in saved)
    layers = kept_bytes({"recompute_granularity": "full"})
    pairs = kept_bytes({"recompute_granularity": "full", "recompute_num_layers": 2})
    first = kept_bytes({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1})
    assert pairs < layers < together < everything
    # logits, and their probabilities, of 61 ids padded to 64
    assert kept_bytes({"cross_entropy_chunk_size": 4}) < everything - tokens * 64 * 8
    assert layers < first < everything


def test_nothing_is_counted_twice() -> None:
    def step(parallel: dict[str, Any]) -> StepResult:
        moe = {"router_type": "deepseek_v3", "aux_loss_coeff": 0.0, "expert_capacity_factor": 1.0}
        return engine_of(parallel, moe).train_step(0, [samples(range(4))])

    once = step({})
    for parallel in ({"recompute_granularity": "full"}, selective("moe", "mlp", "core_attn")):
        again = step(parallel)
        assert again.metrics.loss == once.metrics.loss and again.metrics.aux_losses == once.metrics.aux_losses
        for index, stats in once.metrics.layers.items():
            for name, value in stats.items():
                assert torch.equal(again.metrics.layers[index][name], value), name


@pytest.mark.parametrize(
    ("parallel", "moe", "message"),
    [
        (selective("attention"), {}, r"--recompute-modules attention: expected one or more of core_attn, layernorm"),
        (selective("moe"), {"num_experts": 0}, r"--recompute-modules moe has no effect without experts"),
        (selective("moe_act"), {"num_experts": 0}, r"--recompute-modules moe_act has no effect without experts"),
        (selective("mlp"), {"layer_freq": "1"}, r"--recompute-modules mlp has no effect when every layer is sparse"),
        (
            {**selective("layernorm"), "tensor_model_parallel_size": 2},
            {},
            r"--recompute-modules layernorm has no effect with sequence parallelism",
        ),
    ],
)
def test_a_part_that_is_not_there_is_refused(parallel: dict[str, Any], moe: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config({**MOE, **moe}, parallel, MODEL)


def test_an_extra_layer_beside_sparse_ones_is_a_dense_part() -> None:
    tiny_config({**MOE, "layer_freq": "1", "extra_ffn": "after"}, selective("mlp"), MODEL)
