"""A job that is started over and over and gets nowhere ends with 93; being asked to stop does not count."""

import json
from pathlib import Path

import pytest
from goals import Trials

from megatron_moe.training.restarts import FILE
from tests.end_to_end.commands import (
    LAUNCH,
    call,
    fingerprint,
    problem,
    start,
    steps_in,
    whole_checkpoint,
    write_recipe,
)
from tests.end_to_end.tiny_job import job, write_corpus

LONG = 1_000_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> str:
    """A job that would run for hours, stops when there is a file `stop`, and goes on where it stopped."""
    config = job(
        corpus,
        training={"train_iters": LONG, "kill_switch_file": str(tmp_path / "stop")},
        checkpoint={"save": str(tmp_path / "saved"), "load": "latest"},
        logging={"log_dir": str(tmp_path / "log")},
    )
    return str(write_recipe(tmp_path, config))


def attempts(tmp_path: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((tmp_path / "saved" / FILE).read_text())
    return found


def test_a_crash_loop_ends_with_93_and_preemptions_do_not_count(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--config", recipe, "--exit-interval", "3") == 0
    before = fingerprint(tmp_path / "saved")
    # after an update by 1e38 the squares in a norm are infinite
    crashing = ("--config", recipe, "--lr", "1e38", "--lr-warmup-iters", "0")
    for number in (1, 2, 3):
        assert call(*crashing) == 16
        assert attempts(tmp_path) == {"attempts": number, "step": 3}
        if number == 2:
            (tmp_path / "stop").touch()
            assert [call(*crashing), call(*crashing)] == [75, 75]
            (tmp_path / "stop").unlink()
            assert attempts(tmp_path) == {"attempts": 2, "step": 3}
    capsys.readouterr()

    steps = steps_in(tmp_path / "log")
    # torchrun tries once more, which ends at once as well
    fourth = start(*LAUNCH[:-2], "--max-restarts", "1", *LAUNCH[-2:], *crashing)
    _, said = fourth.communicate(timeout=120)
    assert fourth.returncode == 93, said
    assert f"{tmp_path / 'saved' / FILE}: the last 3 attempts, from step 3 on" in said
    assert "Traceback" not in said
    assert steps_in(tmp_path / "log") == steps

    # one rank says it in one paragraph; both ways out lead out, and the end forgets what was
    assert call(*crashing) == 93
    assert "or raise the number." in problem(capsys.readouterr().err)
    assert call("--config", recipe, "--exit-interval", "1", "--max-restarts-without-progress", "4") == 0
    assert fingerprint(tmp_path / "saved").items() > {k: v for k, v in before.items() if k != "latest"}.items()
    assert whole_checkpoint(tmp_path / "saved").step == 4
    assert not (tmp_path / "saved" / FILE).exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.goal("R21", ci=3, nightly=100, what="a job that crashes, with stops in between: 93 at the fourth")
def test_stops_between_crashes_never_make_it_93(
    recipe: str, tmp_path: Path, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    crashing = ("--config", recipe, "--lr", "1e38", "--lr-warmup-iters", "0")
    step = 0
    for _, rng in trials:
        step += 3
        assert call("--config", recipe, "--exit-interval", str(step)) == 0
        for crash in range(3):
            for _ in range(rng.randint(0, 3)):
                (tmp_path / "stop").touch()
                assert call(*crashing) == 75
                (tmp_path / "stop").unlink()
            assert call(*crashing) == 16
            assert attempts(tmp_path) == {"attempts": crash + 1, "step": step}
        assert call(*crashing) == 93
        assert "or raise the number." in capsys.readouterr().err
        (tmp_path / "saved" / FILE).unlink()
