"""A hundred words made to run something, as arguments, names and variables of the scripts: none does."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from goals import Trials

from tests.house.sources import ROOT

STARTS = ["", "a", "--save=", "-", "'", '"', "\\", "{1..3}", "é ", "a\n"]
RUNS = [
    "$({0})", "`{0}`", "; {0}", "| {0}", "&& {0}", "& {0} #", "\n{0}\n", "'; {0}; '", '"; {0}; "', "a[$({0})]",
]  # fmt: skip
NUMBERS = ["SLURM_JOB_ID", "SLURM_RESTART_COUNT"]
VARIABLES = [*NUMBERS, "SLURM_JOB_NODELIST", "MASTER_ADDR", "MASTER_PORT", "SLURM_SUBMIT_DIR"]
JOB = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NODELIST": "node1"}
TORCHRUN, SLURM = "examples/launch/torchrun.sh", "examples/launch/slurm.sbatch"
PYTHON = """#!/bin/bash
printf '%s\\0' "$@" >"$SEEN"
"""


def words(sentinel: Path) -> list[str]:
    """Each would make the file `sentinel`, if a shell read it."""
    return [start + run.format(f"touch {sentinel}") for start in STARTS for run in RUNS]


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment with a python, srun and scontrol that note or run their arguments."""
    bash = {"python": PYTHON, "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'}
    bash["scontrol"] = "#!/bin/bash\necho node1\n"
    for name, text in bash.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    return {**plain, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(tmp_path / "seen")}


def run(script: str, *arguments: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    folder = Path(environment["SEEN"]).parent
    command = ["bash", str(ROOT / script), *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)


def seen(environment: dict[str, str]) -> list[str]:
    return Path(environment["SEEN"]).read_text().split("\0")[:-1]


@pytest.mark.goal("R38", ci=100, nightly=100, what="words that would run something, given to the scripts: none does")
def test_arguments_arrive_letter_by_letter(stand_ins: dict[str, str], tmp_path: Path, trials: Trials) -> None:
    sentinel = tmp_path / "sentinel"
    given = words(sentinel)
    assert len(set(given)) == 100
    python = f"{tmp_path}/python"
    answer = run(TORCHRUN, "--nproc", "1", "--python", python, "--", *given, environment=stand_ins)
    assert answer.returncode == 0 and seen(stand_ins)[-100:] == given
    answer = run(TORCHRUN, "--nproc", "1", "--dry-run", "--", *given, environment=stand_ins)
    assert read_back(answer.stdout)[-100:] == given
    job = {**stand_ins, **JOB, "SLURM_SUBMIT_DIR": str(tmp_path)}
    answer = run(SLURM, "--python", python, "--", *given, environment=job)
    assert answer.returncode == 0 and seen(job)[-100:] == given, answer.stderr
    assert not sentinel.exists()
    trials.add(len(given))


def read_back(text: str) -> list[str]:
    """What bash would make of a command that was printed for it."""
    command = ["bash", "-c", f"printf '%s\\0' {text}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


@pytest.mark.parametrize("option", ["--nproc", "--max-restarts"])
def test_options_of_the_scripts_run_nothing(option: str, stand_ins: dict[str, str], tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    script = TORCHRUN if option == "--nproc" else SLURM
    for word in words(sentinel)[:20]:
        answer = run(script, option, word, "--dry-run", environment=stand_ins)
        assert answer.returncode == 2 and "is no number" in answer.stderr
    assert not sentinel.exists()


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_schedulers_variables_run_nothing(variable: str, stand_ins: dict[str, str], tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    for word in [run.format(f"touch {sentinel}") for run in RUNS]:
        environment = {**stand_ins, **JOB, "SLURM_SUBMIT_DIR": str(tmp_path), variable: word}
        answer = run(SLURM, "--python", f"{tmp_path}/python", "x", environment=environment)
        if variable in NUMBERS:
            assert answer.returncode == 2 and f"{variable}=" in answer.stderr
    assert not sentinel.exists()


def test_paths_and_options_of_the_test_run_stay_words(stand_ins: dict[str, str], tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    given = words(sentinel)
    script = 'source "$1"; shift; take_environment_options "$@"; printf "%s\\0" "$venv" "$torch_index" "${rest[@]}"'
    options = ["--venv", f"{tmp_path}/{given[0]}", "--torch-index", given[1]]
    command = ["bash", "-c", script, "bash", str(ROOT / "examples/environment.sh"), *options, *given]
    answer = subprocess.run(command, env=stand_ins, capture_output=True, text=True, check=True)
    found = answer.stdout.split("\0")[:-1]
    assert found[1:] == [given[1], *given] and found[0].startswith(str(tmp_path))
    assert not sentinel.exists()


def test_the_scripts_themselves_stand_under_a_hostile_path(stand_ins: dict[str, str], tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    folder = tmp_path / "$(touch sentinel); `touch sentinel` 'x' \"y\" é" / "examples" / "launch"
    folder.mkdir(parents=True)
    for name in ("torchrun.sh", "slurm.sbatch"):
        copy = folder / name
        copy.write_bytes((ROOT / "examples/launch" / name).read_bytes())
        answer = subprocess.run(
            ["bash", copy, "--dry-run", *(["--nproc", "1"] if name == "torchrun.sh" else []), "--", "word"],
            env=stand_ins, cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert shlex.split(answer.stdout)[-1] == "word"
    assert not sentinel.exists()
