"""examples/launch/slurm.sbatch against stand-ins for srun and scontrol: command, signals, requeue decision."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.house.sources import ROOT

SCRIPT = ROOT / "examples/launch/slurm.sbatch"

# runs the rest of its arguments as two ranks, hands USR1 on to them, ends with the larger exit code
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
trap 'again=yes; for pid in "${pids[@]}"; do kill -USR1 -- -$pid; done' USR1
for rank in 0 1; do SLURM_PROCID=$rank SLURMD_NODENAME=node$((rank + 7)) setsid "$@" & pids+=($!); done
most=0
for pid in "${pids[@]}"; do
    again=yes
    while [[ $again == yes ]]; do again=no code=0; wait $pid || code=$?; done
    ((code > most)) && most=$code
done
exit $most
"""
# a job that is put back is ended, its script included; only then can its nodes be changed
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") printf 'node%d\\n' $NODES ;;
"show job") echo "JobId=$4 JobName=x ExcNodeList=$EXCLUDED NumNodes=2" ;;
requeue*) echo "$@" >>"$FAKE/requeued" && kill -TERM $PPID ;;
update*) [[ -e $FAKE/requeued ]] && echo "${@:2}" >>"$FAKE/requeued" && exit "$UPDATED" ;;
*) exit 1 ;;
esac
"""
# stands in for `python -m megatron_moe.pretrain CODE0 CODE1`: ends with the code for its rank, or waits for USR1
PYTHON = """#!/bin/bash
trap 'exit 75' USR1
printf '%s\\n' "$MASTER_ADDR $MASTER_PORT" "$@" >"$FAKE/seen$SLURM_PROCID"
shift 2
code=$1
[[ $SLURM_PROCID == 1 ]] && code=$2
[[ $code == wait ]] && while true; do sleep 0.05; done
exit $code
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on a cluster of stand-ins."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("trainer", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(tmp_path)}
    job |= {"NODES": " ".join(map(str, range(7, 9))), "EXCLUDED": "(null)", "UPDATED": "0"}
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    return {**plain, **job, "FAKE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def start(cluster: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPT), "--python", f"{cluster['FAKE']}/trainer", *arguments]
    return subprocess.Popen(command, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outcome(cluster: dict[str, str], *arguments: str) -> tuple[int, bool]:
    """Exit code of the job, and whether it put itself back into the queue."""
    process = start(cluster, *arguments)
    process.communicate(timeout=60)
    requeued = Path(cluster["FAKE"], "requeued")
    return process.returncode, requeued.exists() and requeued.read_text() == "requeue 123456\n"


def test_dry_run_prints_the_command_and_needs_no_slurm() -> None:
    odd = ["--config", "a b.toml", "$(touch made)", "; touch made", "*"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", str(SCRIPT), "--dry-run", "--python", "python3", "--", *odd]
    answer = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    words = shlex.split(answer.stdout)
    assert words[:2] == ["srun", "--kill-on-bad-exit=0"]
    assert words[-len(odd) - 3 :] == ["python3", "-m", "megatron_moe.pretrain", *odd]
    assert not (Path.cwd() / "made").exists()


def test_the_queue_is_told_to_signal_requeue_and_append() -> None:
    told = {line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"--signal=B:USR1@180", "--requeue", "--open-mode=append"} <= told


def test_ranks_meet_on_the_first_node_and_get_their_arguments(cluster: dict[str, str]) -> None:
    assert outcome(cluster, "0", "0", "a b", "$(x)") == (0, False)
    for rank in (0, 1):
        seen = Path(cluster["FAKE"], f"seen{rank}").read_text().splitlines()
        assert seen == ["node7 23456", "-m", "megatron_moe.pretrain", "0", "0", "a b", "$(x)"]


@pytest.mark.parametrize(
    ("first", "second", "code", "requeued"),
    [
        # what all ranks say together, for every exit code there is
        ("0", "0", 0, False),
        ("2", "2", 2, False),
        ("17", "17", 17, False),
        ("64", "64", 64, False),
        ("65", "65", 65, False),
        ("74", "74", 74, False),
        ("75", "75", 75, True),
        ("86", "86", 86, True),
        ("87", "87", 87, True),
        ("93", "93", 93, False),
        ("1", "1", 1, False),  # a mistake in the program
        # one rank's cause, whatever its peers say of having lost it
        ("86", "0", 86, True),
        ("87", "86", 87, True),
        ("137", "86", 137, True),
        ("138", "143", 143, True),
        ("65", "86", 65, False),
        ("86", "93", 93, False),
        ("16", "64", 64, False),
        ("75", "2", 2, False),
    ],
)
def test_the_ranks_exit_codes_decide(
    cluster: dict[str, str], first: str, second: str, code: int, requeued: bool
) -> None:
    assert outcome(cluster, first, second) == (code, requeued)


def told(cluster: dict[str, str], *arguments: str) -> tuple[int, list[str]]:
    """Exit code of the job, and what it asked of SLURM."""
    process = start(cluster, *arguments)
    process.communicate(timeout=60)
    requeued = Path(cluster["FAKE"], "requeued")
    return process.returncode, requeued.read_text().splitlines() if requeued.exists() else []


def test_a_suspected_fault_comes_back_on_other_nodes(cluster: dict[str, str]) -> None:
    assert told(cluster, "86", "16") == (86, ["requeue 123456", "JobId=123456 ExcNodeList=node8"])


def test_nodes_that_were_excluded_before_stay_so(cluster: dict[str, str]) -> None:
    cluster["EXCLUDED"] = "node[1-3],node5"
    assert told(cluster, "16", "75")[1] == ["requeue 123456", "JobId=123456 ExcNodeList=node[1-3],node5,node7"]


def test_the_only_node_is_excluded_but_not_all_of_many(cluster: dict[str, str]) -> None:
    assert told(cluster, "16", "16") == (16, ["requeue 123456"])
    Path(cluster["FAKE"], "requeued").unlink()
    cluster["NODES"] = "7"
    # the second rank is on node8 for the stand-in
    assert told(cluster, "16", "0")[1] == ["requeue 123456", "JobId=123456 ExcNodeList=node7"]


def test_a_queue_that_will_not_exclude_keeps_the_job(cluster: dict[str, str]) -> None:
    cluster["UPDATED"] = "1"
    assert told(cluster, "16", "0") == (16, ["requeue 123456", "JobId=123456 ExcNodeList=node7"])


def test_the_queues_signal_reaches_the_ranks_and_the_job_comes_back(cluster: dict[str, str]) -> None:
    process = start(cluster, "wait", "wait")
    while not all(Path(cluster["FAKE"], f"seen{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert Path(cluster["FAKE"], "requeued").read_text() == "requeue 123456\n"
    assert "the ranks with: 75 75" in said, said


def test_a_job_that_never_gets_on_is_given_up(cluster: dict[str, str]) -> None:
    cluster["SLURM_RESTART_COUNT"] = "3"
    assert outcome(cluster, "--max-restarts", "3", "86", "86") == (93, False)
    assert outcome(cluster, "--max-restarts", "4", "86", "86") == (86, True)


def test_outside_of_a_job_nothing_starts(cluster: dict[str, str]) -> None:
    del cluster["SLURM_JOB_ID"]
    assert outcome(cluster, "0", "0") == (2, False)
