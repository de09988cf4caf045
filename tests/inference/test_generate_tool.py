"""The command as a person runs it: from a checkpoint to text, alone and on ranks."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint.save import CheckpointWriter
from megatron_moe.config.run import RunConfig
from megatron_moe.data.tokenizer import ByteTokenizer
from megatron_moe.inference.generate import Generator
from megatron_moe.inference.sampling import Sampling
from megatron_moe.models.build import build_stages, gpt_spec, initialise_stages
from megatron_moe.parallel.blocks import module_blocks
from megatron_moe.parallel.state import ParallelState
from tests.inference.tiny_models import CPU, SEED, tiny_run
from tools import generate

ROOT = Path(__file__).parents[2]
STATE = ParallelState.alone()
EOD = ByteTokenizer.eod_id
NEW = 6


def byte_run(**moe: Any) -> RunConfig:
    """A tiny model over bytes."""
    tables = tiny_run(moe).to_dict()
    tables["model"]["vocab_size"] = None
    tables["data"]["tokenizer_type"] = "ByteTokenizer"
    return RunConfig.from_dict(tables, origin="checkpoint")


def save(
    folder: Path, run: RunConfig, steps: tuple[int, ...] = (3,), *, size: int = ByteTokenizer.vocab_size, **data: str
) -> Path:
    """Checkpoints of a model whose first weights depend on the step."""
    writer = CheckpointWriter(folder, STATE.world, keep=None, run_id="tiny", background=False)
    for step in steps:
        stages = build_stages(gpt_spec(run, size), STATE)
        initialise_stages(stages, STATE, SEED + step, CPU)
        known = {"vocab_size": size, "step": step}
        writer.save(step, {"model": module_blocks(stages, STATE)}, known, run.to_json(), data)
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return save(folder, byte_run(), (3, 4), tokenizer=ByteTokenizer().fingerprint())


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher around the tests would say."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def wanted(prompts: list[str], sampling: Sampling, step: int, seed: int = 1234) -> list[list[int]]:
    stages = build_stages(gpt_spec(byte_run(), ByteTokenizer.vocab_size), STATE)
    initialise_stages(stages, STATE, SEED + step, CPU)
    generator = Generator(stages, STATE, stages[0].spec, CPU)
    ids = [list(prompt.encode()) or [EOD] for prompt in prompts]
    return generator.generate(ids, NEW, sampling, eod_id=EOD, seed=seed)


def ask(load: Path, *arguments: str) -> list[str]:
    return ["--load", str(load), "--max-new-tokens", str(NEW), *arguments]


def token_ids(shown: str) -> list[list[int]]:
    return [json.loads(line)["token_ids"] for line in shown.splitlines()]


def test_prompts_are_continued_from_the_newest_step_or_the_one_that_was_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["import os", "def main", ""]
    for step, named in [(4, []), (3, ["--ckpt-step", "3"])]:
        assert generate.main(ask(checkpoint, "--prompt", *prompts, "--greedy", "--json", *named)) == 0
        shown = capsys.readouterr()
        assert token_ids(shown.out) == wanted(prompts, Sampling(greedy=True), step)
        assert shown.err == ""
    first = json.loads(shown.out.splitlines()[0])
    assert first["prompt"] == "import os"
    assert first["text"] == ByteTokenizer().decode([*b"import os", *first["token_ids"]])


def test_the_text_of_each_prompt_is_printed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["import os\n\ndef ", "x"]
    drawn = ["--temperature", "0.8", "--top-k", "40", "--seed", "1"]
    assert generate.main(ask(checkpoint, "--prompt", *prompts, *drawn)) == 0
    answers = wanted(prompts, Sampling(temperature=0.8, top_k=40), 4, seed=1)
    texts = [ByteTokenizer().decode([*start.encode(), *ids]) for start, ids in zip(prompts, answers, strict=True)]
    assert capsys.readouterr().out == f"{texts[0]}\n{'-' * 40}\n{texts[1]}\n"


def test_a_file_a_pipe_and_words_give_the_same_answers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import os\n\ndef main\n"
    (tmp_path / "prompts.txt").write_text(text)
    drawn = ask(checkpoint, "--json", "--top-p", "0.9", "--seed", "5")
    assert generate.main([*drawn, "--prompt-file", str(tmp_path / "prompts.txt"), "--batch-size", "1"]) == 0
    from_file = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert generate.main(drawn) == 0
    from_pipe = capsys.readouterr().out
    assert generate.main([*drawn, "--prompt", "import os", "def main"]) == 0
    assert from_file == from_pipe == capsys.readouterr().out
    assert token_ids(from_file) == wanted(["import os", "def main"], Sampling(top_p=0.9), 4, seed=5)


def test_another_type_than_the_trained_one_may_compute(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(ask(checkpoint, "--prompt", "import", "--greedy", "--json", "--dtype", "fp32")) == 0
    assert token_ids(capsys.readouterr().out) == wanted(["import"], Sampling(greedy=True), 4)


def test_what_a_reader_should_know_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    run = byte_run(expert_capacity_factor=0.4, capacity_rounding="floor")
    folder = save(tmp_path, run, tokenizer="another")
    assert generate.main(["--load", str(folder), "--prompt", "x", "--max-new-tokens", "40"]) == 0
    assert "another tokenizer" in caplog.text
    assert "--dropless serves it" in caplog.text
    assert "41 tokens may come together, but the model was trained for 32" in caplog.text
    limited = capsys.readouterr().out
    caplog.clear()
    assert generate.main(["--load", str(folder), "--prompt", "x", "--max-new-tokens", "40", "--dropless"]) == 0
    assert "--dropless" not in caplog.text
    assert capsys.readouterr().out != limited


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--ckpt-step", "9"], 64, "no checkpoint of step 9"),
        (["--tensor-model-parallel-size", "3"], 2, "1 ranks cannot be split over tensor 3"),
        (["--context-parallel-size", "2"], 2, "decoded one at a time; use 1"),
        (["--expert-tensor-parallel-size", "0"], 2, "--expert-tensor-parallel-size 0"),
        (["--top-k", "0"], 2, "--top-k 0"),
        (["--max-new-tokens", "0"], 2, "--max-new-tokens 0"),
        (["--batch-size", "0"], 2, "--batch-size 0"),
        (["--dropless"], 2, "--dropless has no effect"),
        (["--tokenizer-type", "SentencePieceTokenizer"], 2, "needs --tokenizer-model"),
        (["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "absent"], 65, "there is no file absent"),
    ],
)
def test_what_cannot_be_is_one_paragraph_and_a_code(
    arguments: list[str], code: int, named: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(ask(checkpoint, "--prompt", "x", *arguments)) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and named in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "named"), [(b"\n \n", "holds no prompt"), (b"\xff\xfe\xff", "UTF-8"), (None, "No such")]
)
def test_a_file_without_prompts_is_refused(
    content: bytes | None, named: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "prompts").write_bytes(content)
    assert generate.main(ask(checkpoint, "--prompt-file", str(tmp_path / "prompts"))) == 65
    assert named in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(ask(tmp_path, "--prompt", "x")) == 64
    assert "no checkpoint" in capsys.readouterr().err


def torchrun(*arguments: str, typed: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "megatron_moe.launch", "--nproc-per-node", "2", "--master-port", "0"]
    return subprocess.run(
        [*launcher, "--standalone", "tools/generate.py", *arguments],
        input=typed,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        timeout=100,
    )


@pytest.mark.slow
def test_ranks_that_split_the_model_answer_what_is_typed_to_the_first(checkpoint: Path) -> None:
    layout = ["--pipeline-model-parallel-size", "2"]
    done = torchrun(*ask(checkpoint, "--json", "--greedy"), *layout, typed="import os\ndef main\n")
    assert done.returncode == 0, done.stderr
    assert token_ids(done.stdout) == wanted(["import os", "def main"], Sampling(greedy=True), 4)


@pytest.mark.slow
def test_what_only_the_first_rank_can_find_wrong_ends_all_ranks(checkpoint: Path) -> None:
    done = torchrun(*ask(checkpoint, "--prompt-file", "absent.txt"), "--tensor-model-parallel-size", "2", typed="")
    assert done.returncode == 65, done.stderr
    assert done.stderr.count("--prompt-file absent.txt cannot be read") == 1
