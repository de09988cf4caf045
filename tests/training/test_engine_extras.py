"""What a step adds when it is asked to: recomputation, a second pass, the mean over layers, what routers remember."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_moe.certify.tiny_model import VOCAB, samples, tiny_config
from megatron_moe.config.errors import ConfigError, NonFiniteError
from megatron_moe.config.run import RunConfig
from megatron_moe.layers.attention import Attention
from megatron_moe.optim.lr_schedule import learning_rate
from megatron_moe.parallel.blocks import module_blocks
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.engine import Engine, StepResult
from megatron_moe.training.validate import validate

LOSSES = {"aux_loss_coeff": 0.01}


def engine_of(moe: dict[str, Any], parallel: dict[str, Any] | None = None) -> tuple[RunConfig, Engine]:
    config = tiny_config(moe, parallel or {}, {})
    return config, Engine(config, ParallelState.alone(), torch.device("cpu"), VOCAB)


def step(engine: Engine) -> StepResult:
    return engine.train_step(0, [samples([0, 1]), samples([2, 3])])


def test_recomputation_runs_each_layer_again_and_only_in_training() -> None:
    for granularity, runs in ((None, 1), ("full", 2)):
        _, engine = engine_of({"router_type": "switch"}, {"recompute_granularity": granularity})
        calls = []
        for module in engine.stages[0].modules():
            if isinstance(module, Attention):
                module.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        step(engine)
        assert len(calls) == 4 * 2 * runs
        calls.clear()
        engine.evaluate([samples([0, 1])])
        assert len(calls) == 4


def test_two_passes_draw_differently_and_are_reported() -> None:
    _, once = engine_of({"router_type": "switch", **LOSSES})
    _, twice = engine_of({"router_type": "switch", "consistency_coeff": 5.0, **LOSSES})
    one, two = step(once).metrics, step(twice).metrics
    assert "consistency_loss" not in one.aux_losses
    # jitter differs between the passes, so that they disagree a little; the cross-entropy is a mean of both
    assert 0.0 < two.aux_losses["consistency_loss"] < 0.01
    assert two.loss == pytest.approx(one.loss, rel=1e-3) and two.loss != one.loss
    tokens = [sum(float(stats["tokens"]) for stats in found.layers.values()) for found in (one, two)]
    assert tokens[1] == 2 * tokens[0]
    # an auxiliary loss is a mean over routing groups, however many passes there are
    assert two.aux_losses["load_balance_loss"] == pytest.approx(one.aux_losses["load_balance_loss"], rel=0.05)
    # evaluation sees each sample once
    assert "consistency_loss" not in twice.evaluate([samples([0, 1])])[0].aux_losses


def test_the_mean_of_two_cross_entropies_has_half_their_gradient() -> None:
    fields = {"router_type": "gshard", "consistency_coeff": 0.0}
    norms = []
    for reduction in ("sum", "mean"):
        _, engine = engine_of({**fields, "consistency_cross_entropy": reduction})
        norms.append(step(engine).grad_norm)
    assert norms[0] == pytest.approx(2 * norms[1], rel=1e-12)


def test_two_passes_need_a_router_that_draws() -> None:
    for moe in ({"router_type": "top_k"}, {"router_type": "switch", "router_options": {"jitter_eps": "0"}}):
        with pytest.raises(ConfigError, match=r"--moe-consistency-coeff 5 has no effect .* two passes agree"):
            validate(tiny_config({**moe, "consistency_coeff": 5.0}, {}, {}))
    validate(tiny_config({"router_type": "switch", "consistency_coeff": 5.0}, {}, {}))


def test_nodes_need_rows_that_travel_to_experts() -> None:
    layout = {"expert_model_parallel_size": 4, "expert_model_parallel_ranks_per_node": 2}
    memory = {"router_type": "product_keys", "ffn_hidden_size": 16, "num_experts": 16, "activation": None}
    validate(tiny_config(memory, {"expert_model_parallel_size": 4}, {}))
    with pytest.raises(ConfigError, match=r"-ranks-per-node 2 has no effect with the router product_keys, which sends"):
        validate(tiny_config(memory, layout, {}))
    # rows of another stack do
    sam = {"router_type": "sam", "num_experts": 8, "router_options": {"groups": "4"}}
    validate(tiny_config(memory, layout, {"encoder_num_layers": 2}, encoder_moe=sam))
    validate(tiny_config({"router_type": "top_k"}, layout, {}))


def test_the_mean_over_two_layers_is_half_their_sum() -> None:
    norms = []
    for coefficient, reduction in ((50.0, "sum"), (100.0, "mean"), (100.0, "sum")):
        _, engine = engine_of(
            {"router_type": "switch", "aux_loss_coeff": coefficient, "aux_layer_reduction": reduction}
        )
        norms.append(step(engine).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    assert norms[2] > 1.5 * norms[1]


def test_draws_change_from_step_to_step() -> None:
    losses = []
    for number in (0, 0, 1):
        _, engine = engine_of({"router_type": "switch"})
        losses.append(engine.train_step(number, [samples([0, 1])]).metrics.loss)
    assert losses[0] == losses[1] != losses[2]


def test_layers_are_told_the_progress_and_what_they_and_all_layers_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = engine_of({"router_type": "top_k"})
    told: dict[int, list[Any]] = {}
    for index, layer in engine.stages[0].moe_layers().items():
        told[index] = []
        monkeypatch.setattr(layer, "before_step", told[index].append)
        monkeypatch.setattr(layer, "after_step", lambda own, model, seen=told[index]: seen.extend((own, model)))
    engine.train_step(2, [samples([0, 1]), samples([2, 3])])
    (progress, own, model), (_, other, same) = told[1], told[3]
    assert progress == 2 / 3
    for name in ("tokens", "requested"):
        torch.testing.assert_close(own[name] + other[name], model[name])
        assert torch.equal(model[name], same[name])
    # two experts for each token, and not the same ones in both layers
    assert own["requested"].sum() == 2 * own["tokens"] and not torch.equal(own["requested"], other["requested"])


def test_a_loss_that_is_no_number_names_its_step_and_changes_nothing() -> None:
    _, engine = engine_of({"router_type": "top_k"})
    with torch.no_grad():
        next(engine.stages[0].parameters()).fill_(torch.nan)
    before = [parameter.clone() for parameter in engine.stages[0].parameters()]
    with pytest.raises(NonFiniteError, match="step 3: the loss of rank 0 is not finite"):
        engine.train_step(2, [samples([0, 1])])
    for parameter, kept in zip(engine.stages[0].parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(), kept.nan_to_num())


def test_a_step_has_the_learning_rate_of_its_place_in_the_run() -> None:
    config, _ = engine_of({"router_type": "top_k"})
    config = replace(config, optimizer=replace(config.optimizer, lr=0.8, min_lr=0.0, lr_warmup_iters=2))
    engine = Engine(config, ParallelState.alone(), torch.device("cpu"), VOCAB)
    found = engine.train_step(1, [samples([0, 1])])
    assert found.learning_rate == learning_rate(config.optimizer, 1, 3) == pytest.approx(0.4)


def test_a_validation_loss_comes_with_the_tokens_that_it_is_a_mean_over() -> None:
    _, engine = engine_of({"router_type": "top_k"})
    batches = [samples([0, 1]), samples([2, 3])]
    counts = [float(batch.decoder.loss_mask.sum()) for batch in batches]
    alone = [engine.evaluate([batch])[0].loss for batch in batches]
    found, tokens = engine.evaluate(batches)
    assert tokens == sum(counts) > 1
    assert found.loss == pytest.approx(sum(a * b for a, b in zip(alone, counts, strict=True)) / tokens)


def test_what_a_router_remembers_is_stored_like_a_weight() -> None:
    _, engine = engine_of({"router_type": "deepseek_v3"})
    names = {block.name for block in module_blocks(engine.modules, engine.state)}
    assert {"layers.1.mlp.router.expert_bias", "layers.3.mlp.router.expert_bias"} <= names
    before = {block.name: block.tensor.clone() for block in module_blocks(engine.modules, engine.state)}
    step(engine)
    after = {block.name: block.tensor for block in module_blocks(engine.modules, engine.state)}
    assert not torch.equal(before["layers.1.mlp.router.expert_bias"], after["layers.1.mlp.router.expert_bias"])
    # evaluation teaches it nothing
    kept = after["layers.1.mlp.router.expert_bias"].clone()
    engine.evaluate([samples([0, 1])])
    assert torch.equal(kept, after["layers.1.mlp.router.expert_bias"])
