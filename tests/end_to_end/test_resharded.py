"""A run goes on from a rewritten checkpoint, bit for bit as from the one that was saved."""

from pathlib import Path

from ranks import run_on_ranks

from megatron_moe.checkpoint.catalogue import open_place
from megatron_moe.checkpoint.rewrite import reshard
from megatron_moe.config.run import RunConfig
from tests.end_to_end.tiny_job import attempt, job, read_steps, write_corpus

RANKS = 2
# deepseek_v3 remembers a bias for each expert
ROUTER = {"router_type": "deepseek_v3", "aux_loss_coeff": 0.0}


def run(config: RunConfig, notes: Path) -> list[tuple[int, float, str]]:
    """Step, loss and a hash of weights, moments, router state and counters, for each step."""
    notes.mkdir()
    assert run_on_ranks(RANKS, attempt, config.to_json(), str(notes), 0, None) == [0] * RANKS
    return [(step.step, step.loss, step.state) for step in read_steps(notes, RANKS)]


def test_a_run_goes_on_from_one_file_and_from_files_for_three_ranks(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "tokens")
    saved = tmp_path / "saved"
    run(job(corpus, moe=ROUTER, training={"exit_interval": 4}, checkpoint={"save": str(saved)}), tmp_path / "first")
    found = {}
    for ranks in (None, 1, 3):
        root = saved if ranks is None else tmp_path / f"as {ranks}"
        if ranks is not None:
            reshard(open_place(saved), root, ranks)
        config = job(corpus, moe=ROUTER, training={"exit_interval": 7}, checkpoint={"load": str(root)})
        found[ranks] = run(config, tmp_path / f"from {ranks}")
    assert [step for step, _, _ in found[None]] == [5, 6, 7]
    assert found[1] == found[None] and found[3] == found[None]
