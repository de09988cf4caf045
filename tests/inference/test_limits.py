"""What capacity does to tokens that come alone is said, and can be lifted."""

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.inference.generate import Generator
from megatron_moe.inference.limits import decoding_notes, lift_capacity
from megatron_moe.inference.sampling import Sampling
from megatron_moe.models.build import gpt_spec
from megatron_moe.parallel.state import ParallelState
from tests.inference.tiny_models import CPU, VOCAB, Tables, build, generator_of, greedy_by_whole_passes, tiny_run

PROMPTS, NEW = [[3, 1, 4, 1, 5, 9], [2, 6, 5]], 6
# 0.4 x 2 / 4 = 0.2 places for a lone token
FLOOR = {"expert_capacity_factor": 0.4, "capacity_rounding": "floor"}


def notes_of(moe: Tables) -> str:
    return "\n".join(decoding_notes(gpt_spec(tiny_run(moe), VOCAB)))


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"num_experts": 0},
        {"expert_capacity_factor": 0.4},
        {**FLOOR, "min_capacity": 1},
        {**FLOOR, "eval_capacity_factor": 2.0},
    ],
)
def test_usually_there_is_nothing_to_say(moe: Tables) -> None:
    assert notes_of(moe) == ""


def test_a_rounding_that_leaves_a_lone_token_no_place_is_said_once() -> None:
    notes = notes_of(FLOOR)
    assert "capacity factor of 0.4 rounded by floor" in notes and "--dropless" in notes
    assert notes.count("\n") == 0


def test_a_router_that_sees_the_future_is_named() -> None:
    assert "expert_choice" in notes_of({"router_type": "expert_choice", "allow_noncausal": True})


def test_without_limits_decoding_equals_whole_passes_of_a_dropless_model() -> None:
    state = ParallelState.alone()
    stages = build(tiny_run(FLOOR), state)
    limited = Generator(stages, state, stages[0].spec, CPU)
    before = limited.generate(PROMPTS, NEW, Sampling(greedy=True), eod_id=None, seed=1)
    lift_capacity(stages, state)
    after = limited.generate(PROMPTS, NEW, Sampling(greedy=True), eod_id=None, seed=1)
    (dropless,) = build(tiny_run(), state)  # weights depend on names only
    assert after == [greedy_by_whole_passes(dropless, prompt, NEW) for prompt in PROMPTS]
    assert before != after
    assert after == generator_of(tiny_run()).generate(PROMPTS, NEW, Sampling(greedy=True), eod_id=None, seed=1)


@pytest.mark.parametrize("moe", [{}, {"num_experts": 0}])
def test_lifting_no_limit_is_refused(moe: Tables) -> None:
    state = ParallelState.alone()
    with pytest.raises(ConfigError, match="--dropless has no effect"):
        lift_capacity(build(tiny_run(moe), state), state)
