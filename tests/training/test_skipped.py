"""Steps that update nothing: as if they had not been, up to a limit, remembered by checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks

from megatron_moe.config.errors import ConfigError, MegatronMoEError, NonFiniteError, SpikeError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.training import TrainingConfig
from megatron_moe.parallel.state import ParallelState
from megatron_moe.training.skipped import Skipped, SkippedStep
from megatron_moe.training.trainer import Trainer
from tests.end_to_end.tiny_job import CPU, job, state_hash, write_corpus
from tests.training.bad_numbers import Strike
from tests.training.bit_flips import make_trainer

SPARSE = {"layer_freq": "1"}
SKIP = {"nonfinite_action": "skip", "max_skipped_steps": 2}
CONFIG = TrainingConfig(global_batch_size=4, train_iters=9, **SKIP)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def test_more_than_so_many_in_a_row_stop_the_run() -> None:
    skipped = Skipped(CONFIG)
    error = NonFiniteError("step 1: no number")
    for step in (1, 2, 4, 5):
        if step == 4:
            skipped.made()
        skipped.skip(error, step, range(4 * step - 4, 4 * step))
    with pytest.raises(NonFiniteError, match="--max-skipped-steps") as caught:
        skipped.skip(error, 6, range(20, 24))
    assert caught.value.exit_code == 16 and "step 1: no number" in str(caught.value)
    assert skipped.steps[-1] == SkippedStep(5, 16, 19, "not finite") and len(skipped.steps) == 4


def test_a_checkpoint_remembers_them_and_older_ones_know_none() -> None:
    skipped, again = Skipped(CONFIG), Skipped(CONFIG)
    skipped.skip(SpikeError("far up"), 3, range(8, 12))
    again.load_state_dict(json.loads(json.dumps(skipped.state_dict())))
    assert again.steps == [SkippedStep(3, 8, 11, "spike")] and again.in_a_row == 1
    again.load_state_dict({})
    assert again.steps == [] and again.in_a_row == 0


def test_stop_is_the_default_and_spikes_are_skipped_nevertheless() -> None:
    skipped = Skipped(TrainingConfig(global_batch_size=4, train_iters=9, spike_sigma=6.0))
    skipped.skip(SpikeError("far up"), 1, range(4))
    with pytest.raises(NonFiniteError):
        skipped.skip(NonFiniteError("no number"), 2, range(4, 8))


def skip_two(rank: int, world_size: int, text: str) -> tuple[list[Any], list[str], str]:
    """Steps 2 and 3 are struck: what each returned, states with and without them, what a third one in a row says."""
    trainer = make_trainer(text, world_size)
    made = [trainer.train_step() is not None]
    strike = Strike("expert output", rank=1, microbatch=1)
    with strike.on(trainer.engine):
        made += [trainer.train_step() is not None for _ in range(2)]
    made.append(trainer.train_step() is not None)
    hashes = [state_hash(trainer)]
    other = make_trainer(text, world_size)
    other.train_step()
    for _ in range(2):
        other._next(other.loader)
        other.step += 1
    other.train_step()
    hashes.append(state_hash(other))
    told = ""
    with strike.on(trainer.engine):
        trainer.train_step()
        trainer.train_step()
        try:
            trainer.train_step()
        except MegatronMoEError as error:
            told = f"{error.exit_code} {error}"
    steps = [[step.step, step.first_sample, step.last_sample] for step in trainer.skipped.steps]
    return [made, steps], hashes, told


@pytest.mark.goal("R26", ci=1, nightly=1, what="skipped steps: as if they had not been, and more than K in a row stop")
def test_a_skipped_step_is_as_if_it_had_not_been(corpus: Path, trials: Any) -> None:
    answers = run_on_ranks(2, skip_two, job(corpus, moe=SPARSE, training=SKIP).to_json())
    for (made, steps), (skipping, without), told in answers:
        assert skipping == without
        assert made == [True, False, False, True]
        assert steps == [[2, 4, 7], [3, 8, 11], [5, 16, 19], [6, 20, 23]]
        assert told.startswith("16 step 7: ") and "--max-skipped-steps allows" in told
    trials.add(1)


def run(config: RunConfig, struck: int | None) -> Trainer:
    """A run to its end on this process, of which the step with this number, counted from 0, is struck."""
    trainer = Trainer(config, ParallelState.alone(), CPU)
    real = trainer.engine.train_step

    def train_step(step: int, *rest: Any) -> Any:
        if step != struck:
            return real(step, *rest)
        with Strike("activation", rank=0, microbatch=1).on(trainer.engine):
            return real(step, *rest)

    trainer.engine.train_step = train_step  # type: ignore[method-assign]
    trainer.run()
    return trainer


def test_a_run_goes_on_over_a_skipped_step_bit_exactly(corpus: Path, tmp_path: Path) -> None:
    training = {**SKIP, "train_iters": 6, "spike_sigma": 50.0, "spike_window": 4}
    whole = run(job(corpus, moe=SPARSE, training=training), 1)
    assert whole.skipped.steps == [SkippedStep(2, 4, 7, "not finite")]
    folder = {"save": str(tmp_path / "kept"), "load": "latest", "save_interval": 2}
    run(job(corpus, moe=SPARSE, training={**training, "exit_interval": 4}, checkpoint=folder), 1)
    resumed = run(job(corpus, moe=SPARSE, training=training, checkpoint=folder), None)
    assert resumed.first_step == 4
    assert state_hash(resumed) == state_hash(whole)
    assert resumed.skipped.steps == whole.skipped.steps
    assert resumed.spikes.state_dict() == whole.spikes.state_dict()


@pytest.mark.parametrize("text", ["8", "8-", "a-b", "8-10", "9-11", "8-7"])
def test_a_range_of_samples_is_whole_batches(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--skip-samples {text} "):
        TrainingConfig(global_batch_size=4, train_iters=9, skip_samples=(text,))


def test_ranges_of_samples_ascend() -> None:
    with pytest.raises(ConfigError, match="must ascend without overlap"):
        TrainingConfig(global_batch_size=4, train_iters=9, skip_samples=("8-15", "12-19"))


@pytest.mark.goal(
    "R27",
    ci=1,
    nightly=1,
    what="back to an older checkpoint and past the samples of a spike: bit-identical to a new run told the same ranges",
)
@pytest.mark.parametrize("workers", [0, 2])
def test_going_back_and_past_samples_is_reproducible(
    corpus: Path, tmp_path: Path, trials: Any, workers: int
) -> None:
    data = {"num_workers": workers}
    first = {"train_iters": 6}
    folder = {"save": str(tmp_path / "first"), "save_interval": 2}
    run(job(corpus, training=first, checkpoint=folder, data=data), None)
    # step 4 (samples 12 to 15) and the one before it are to be passed over
    past = {"train_iters": 6, "skip_samples": ["8-15"]}
    back = {"load": str(tmp_path / "first"), "ckpt_step": 2, "save": str(tmp_path / "second"), "save_interval": 4}
    again = run(job(corpus, training=past, checkpoint=back, data=data), None)
    fresh = run(job(corpus, training=past, data=data), None)
    assert again.first_step == 2 and again.loader.state_dict() == {"consumed_samples": 32}
    assert state_hash(again) == state_hash(fresh)
    trials.add(1)
