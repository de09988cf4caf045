"""What a person gets wrong ends with one paragraph that names the way out, its exit code, and every file as it was."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from goals import Trials

from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.indexed_writer import IndexedDatasetWriter
from tests.end_to_end.commands import call, fingerprint, problem, steps_in, whole_checkpoint, write_recipe
from tests.end_to_end.tiny_job import job, tables, write_corpus
from tests.house.sources import ROOT
from tools import preprocess_data

RECIPE = ("--config", "@/job.json")
BYTES = ("--tokenizer-type", "ByteTokenizer")


@dataclass(frozen=True)
class Case:
    """A command with a mistake in it. "@" in the arguments and words stands for the folder with all the files."""

    arguments: tuple[str, ...]
    code: int
    words: tuple[str, ...]
    program: str = "pretrain"


CASES = {
    # options
    "unknown flag": Case((*RECIPE, "--num-expert", "4"), 2, ("--num-expert", "did you mean '--num-experts'?")),
    "unknown key": Case(("--config", "@/key.toml"), 2, ("@/key.toml", "[moe] has no option 'topk'", "'router_topk'")),
    "unknown table": Case(("--config", "@/table.toml"), 2, ("no table [modl]", "did you mean 'model'?")),
    "broken recipe": Case(("--config", "@/broken.toml"), 2, ("@/broken.toml: not valid TOML",)),
    "missing recipe": Case(("--config", "@/none.toml"), 2, ("@/none.toml", "give a file that can be read")),
    "no number": Case((*RECIPE, "--num-layers", "two"), 2, ("--num-layers two: expected an integer",)),
    "wrong type": Case(("--config", "@/type.toml"), 2, ('num_layers = "two"', "expected an integer")),
    "no choice": Case((*RECIPE, "--lr-decay-style", "cosin"), 2, ("--lr-decay-style cosin", "did you mean 'cosine'?")),
    "no router": Case((*RECIPE, "--moe-router-type", "top_q"), 2, ("top_q", "did you mean 'top_k'?")),
    # layouts
    "tensor": Case((*RECIPE, "--tensor-model-parallel-size", "3"), 2, ("--num-query-groups 2", "1 or 2")),
    "ranks": Case((*RECIPE, "--tensor-model-parallel-size", "2"), 2, ("1 ranks cannot be shared out", "multiple of 2")),
    "pipeline": Case((*RECIPE, "--pipeline-model-parallel-size", "3"), 2, ("--num-layers 2", "2 stages or fewer")),
    "experts": Case((*RECIPE, "--expert-model-parallel-size", "3"), 2, ("--num-experts 4", "1, 2 or 4")),
    "context": Case((*RECIPE, "--context-parallel-size", "3"), 2, ("--seq-length 8", "multiple of 6, such as 12")),
    "batch": Case((*RECIPE, "--micro-batch-size", "3"), 2, ("--global-batch-size 4", "--micro-batch-size 3")),
    # corpora
    "missing corpus": Case(
        (*RECIPE, "--data-path", "@/none"), 65, ("no corpus at '@/none'", "tools/preprocess_data.py")
    ),
    "cut .bin": Case(
        (*RECIPE, "--data-path", "@/cut"), 65, ("@/cut.bin has", "cut short", "Copy the .bin/.idx pair again")
    ),
    "wrong magic": Case((*RECIPE, "--data-path", "@/magic"), 65, ("@/magic.idx is no Megatron index", "make it again")),
    "cut .idx": Case((*RECIPE, "--data-path", "@/index"), 65, ("@/index.idx has", "cut short or damaged")),
    "rotten .bin": Case((*RECIPE, "--data-path", "@/bits"), 65, ("@/bits.bin: bytes 0 to", "xxh3-128", "--write-")),
    "rotten .idx": Case((*RECIPE, "--data-path", "@/bounds"), 65, ("@/bounds.idx is damaged", "says", "Copy the pair")),
    "rotten hashes": Case((*RECIPE, "--data-path", "@/sums"), 65, ("@/sums.hashes.json is damaged", "--write-hashes")),
    "large token": Case((*RECIPE, "--data-path", "@/large"), 65, ("holds token", "vocabulary ends at 60", "tokenizer")),
    "short corpus": Case((*RECIPE, "--seq-length", "4096"), 65, ("fewer than one sample", "shorten --seq-length")),
    "no validation": Case(
        (*RECIPE, "--data-path", "@/tiny", "--eval-interval", "5"), 2, ("leaves no sample for valid", "larger share")
    ),
    # tokenizers
    "no tokenizer": Case(
        (*RECIPE, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "@/none.model"),
        65,
        ("there is no file @/none.model", "check the path"),
    ),
    "wrong tokenizer": Case(
        (*RECIPE, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "@/job.json"),
        65,
        ("@/job.json is not a SentencePiece model", "give the .model file"),
    ),
    "small vocabulary": Case((*RECIPE, *BYTES), 2, ("--vocab-size 61 is smaller than the tokenizer's 257", "raise it")),
    # checkpoints
    "another tokenizer": Case(
        (*RECIPE, "--load", "@/saved", *BYTES, "--vocab-size", "257", "--make-vocab-size-divisible-by", "8"),
        2,
        ("started with another tokenizer (its fingerprint was", "--finetune"),
    ),
    "another corpus": Case(
        (*RECIPE, "--load", "@/saved", "--data-path", "@/other"), 2, ("another training corpus (its", "--finetune")
    ),
    "other words": Case((*RECIPE, "--load", "@/saved", "--data-path", "@/words"), 2, ("another training text (its",)),
    "another order": Case((*RECIPE, "--load", "@/saved", "--seed", "5"), 2, ("--seed was 1234 and is 5", "--finetune")),
    "another model": Case(
        (*RECIPE, "--load", "@/saved", "--hidden-size", "32", "--swiglu", "--num-experts", "8"),
        2,
        ("--hidden-size was 16 and is 32", "--num-experts was 4 and is 8", "--finetune"),
    ),
    "weights of another model": Case(
        (*RECIPE, "--load", "@/saved", "--hidden-size", "32", "--finetune"),
        65,
        ("does not fit this model", "needed [64, 32]", "config.json"),
    ),
    "no checkpoint": Case(
        (*RECIPE, "--load", "@/none", "--exit-on-missing-checkpoint"), 64, ("no checkpoint in @/none", "check the path")
    ),
    "no such step": Case((*RECIPE, "--load", "@/saved", "--ckpt-step", "7"), 64, ("step 7", "there are: 4, 2")),
    "broken step": Case(
        (*RECIPE, "--load", "@/rotten", "--ckpt-step", "4"), 65, ("step 4 in @/rotten is broken", "Name another step")
    ),
    "none whole": Case(
        (*RECIPE, "--load", "@/rotten"), 64, ("No checkpoint in @/rotten is whole", "to start at step 0, move")
    ),
    # what is there already
    "checkpoints of another run": Case(
        (*RECIPE, "--save", "@/saved"), 2, ("holds a checkpoint of step 4 already", "--load latest")
    ),
    "a file for --save": Case((*RECIPE, "--save", "@/job.json/x"), 74, ("--save @/job.json/x", "Name one that is")),
    "a file for --log-dir": Case((*RECIPE, "--log-dir", "@/job.json"), 74, ("@/job.json", "name a place")),
    "tokens are there": Case(
        ("--input", "@/good.jsonl", "--output-prefix", "@/made", *BYTES),
        2,
        ("@/made_text_document", "--overwrite"),
        "preprocess",
    ),
    # text
    "broken line": Case(
        ("--input", "@/bad.jsonl", "--output-prefix", "@/new", *BYTES),
        65,
        ("@/bad.jsonl, line 3: not valid JSON",),
        "preprocess",
    ),
    "missing text": Case(
        ("--input", "@/none.jsonl", "--output-prefix", "@/new", *BYTES),
        2,
        ("@/none.jsonl' names no file", "check the path"),
        "preprocess",
    ),
}


def write_text(folder: Path) -> None:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(4)]
    (folder / "good.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "bad.jsonl").write_text("\n".join([*lines[:2], '{"text": "cut sho', *lines[2:]]) + "\n")
    for name in ("made_text_document.bin", "made_text_document.idx"):
        (folder / name).write_bytes(b"work of weeks")


def write_recipes(folder: Path) -> None:
    (folder / "key.toml").write_text("[moe]\ntopk = 2\n")
    (folder / "table.toml").write_text("[modl]\nnum_layers = 2\n")
    (folder / "broken.toml").write_text("[model\n")
    (folder / "type.toml").write_text('[model]\nnum_layers = "two"\n')


def write_corpora(folder: Path) -> None:
    write_corpus(folder / "tokens")
    write_corpus(folder / "other", seed=6)
    write_corpus(folder / "large", top=200)
    write_corpus(folder / "tiny", documents=3)
    for name in ("cut", "magic", "index", "bits", "bounds", "sums"):
        write_corpus(folder / name)
    for name in ("bits.bin", "bounds.idx", "sums.hashes.json"):
        damage(folder / name, lambda data: data[:-16] + bytes([data[-16] ^ 1]) + data[-15:])
    reword(folder / "tokens", folder / "words")
    damage(folder / "cut.bin", lambda data: data[:-2])
    damage(folder / "magic.idx", lambda data: b"\x93NUMPY" + data[6:])
    damage(folder / "index.idx", lambda data: data[:-8])


def reword(source: Path, target: Path) -> None:
    """A corpus with the same index and other tokens."""
    corpus = IndexedDataset(source)
    with IndexedDatasetWriter(target, dtype=corpus.dtype) as writer:
        for number in range(len(corpus)):
            writer.add_document(corpus.sequence(number)[::-1])
        writer.finish()


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def flip_a_bit(checkpoint: Path) -> None:
    """In the last number of a file of weights."""
    path = next(checkpoint.glob("model-*.safetensors"))
    damage(path, lambda data: data[:-1] + bytes([data[-1] ^ 1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the cases name: a good run with checkpoints, and files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("input")
    write_recipes(folder)
    write_corpora(folder)
    write_text(folder)
    recipe = write_recipe(folder, job(folder / "tokens"))
    stop = ("--exit-interval", "4", "--save-interval", "2")
    assert call("--config", str(recipe), *stop, "--save", str(folder / "saved")) == 0
    assert call("--config", str(recipe), *stop, "--save", str(folder / "rotten")) == 0
    for step in (2, 4):
        flip_a_bit(folder / "rotten" / f"step_{step:08d}")
    return folder


@pytest.fixture(scope="module", params=["", "-O"], ids=["python", "python -O"])
def answers(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command said, from one process for all."""
    listed = tmp_path_factory.mktemp("cases") / "cases.json"
    cases = {
        name: {
            "program": case.program,
            "arguments": [word.replace("@", str(folder)) for word in case.arguments],
            "watched": str(folder),
        }
        for name, case in CASES.items()
    }
    listed.write_text(json.dumps(cases))
    command = [
        sys.executable,
        *([request.param] if request.param else []),
        "-m",
        "tests.end_to_end.run_cases",
        str(listed),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True, timeout=110)
    found: dict[str, Any] = json.loads(done.stdout)
    assert all(answer["checks"] == (request.param == "") for answer in found.values())
    return found


GOALS = {
    "another tokenizer": "R31",
    "wrong tokenizer": "R31",
    "small vocabulary": "R31",
    "large token": "R31",
    "another corpus": "R34",
    "other words": "R34",
}
MEANT = {
    "R31": "wrong tokenizers and tokens beyond the vocabulary: refused before the first step",
    "R34": "a corpus that is not the one of the checkpoint: refused, with both fingerprints",
    "R43": "mistakes of other kinds: one paragraph, its exit code, no file changed; under python -O too",
}


def marked(name: str) -> Any:
    goal = GOALS.get(name, "R43")
    return pytest.param(name, marks=pytest.mark.goal(goal, ci=1, nightly=1, what=MEANT[goal]))


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_a_mistake_is_one_paragraph_and_changes_nothing(
    name: str, answers: dict[str, Any], folder: Path, trials: Trials
) -> None:
    case, answer = CASES[name], answers[name]
    said = answer["said"]
    assert answer["code"] == case.code, answer
    assert answer["changed"] == []
    assert "Traceback" not in said and "Traceback" not in answer["out"]
    opening = "megatron_moe: " if case.program == "pretrain" else "error: "
    assert said.startswith(opening) and said.count(opening) == 1, said
    assert "\n\n" not in said
    for word in case.words:
        assert word.replace("@", str(folder)) in said, word
    trials.add(1)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, []),
        ({"RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}, ["megatron_moe: there is no option --nonsense"]),
        ({"RANK": "0", "WORLD_SIZE": "8"}, ["megatron_moe: torchrun set RANK but not LOCAL_RANK; start the job"]),
    ],
    ids=["second rank of a machine", "first rank of a machine", "half a launcher"],
)
def test_before_the_ranks_meet_one_of_each_machine_speaks(
    place: dict[str, str], said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert call("--nonsense") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


def test_a_broken_checkpoint_is_passed_over_for_an_older_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, job(folder / "tokens", logging={"log_dir": str(tmp_path / "log")}))
    saving = ("--config", str(recipe), "--save", str(tmp_path / "saved"), "--load", "latest", "--save-interval", "2")
    assert call(*saving, "--exit-interval", "4") == 0
    flip_a_bit(tmp_path / "saved" / "step_00000004")
    capsys.readouterr()
    assert call(*saving, "--exit-interval", "6") == 0
    shown = capsys.readouterr().out
    assert "Going on from step 2" in shown and "newer checkpoints are broken" in shown
    assert "resuming after step 2 (8 samples)" in shown
    assert steps_in(tmp_path / "log") == [1, 2, 3, 4, 5, 6]
    # the broken one was replaced
    assert "step 4 was saved before, but broken, and is replaced" in shown
    assert whole_checkpoint(tmp_path / "saved").step == 6


def test_broken_lines_are_counted_and_left_out_when_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(folder / "bad.jsonl"), "--output-prefix", str(tmp_path / "made"), *BYTES]
    assert preprocess_data.main([*arguments, "--on-error", "skip"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("4 documents, 40 tokens, 1 records skipped\n")
    assert f"skipped {folder / 'bad.jsonl'}, line 3: not valid JSON" in shown.err


def test_a_mistake_leaves_the_log_of_the_run_before(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, job(folder / "tokens", logging={"log_dir": str(tmp_path / "log")}))
    assert call("--config", str(recipe), "--exit-interval", "2") == 0
    before = fingerprint(tmp_path / "log")
    capsys.readouterr()
    assert call("--config", str(recipe), "--data-path", str(tmp_path / "none")) == 65
    assert problem(capsys.readouterr().err).startswith("no corpus at")
    after = fingerprint(tmp_path / "log")
    assert before.keys() == after.keys() == {"config.json", "log.txt", "metrics.jsonl", "routing.jsonl"}
    assert [name for name in after if after[name] != before[name]] == ["log.txt"]


def test_the_cases_start_from_a_job_that_is_right(folder: Path) -> None:
    assert json.loads((folder / "job.json").read_text())["model"]["num_layers"] == tables(folder)["model"]["num_layers"]
    assert call("--config", str(folder / "job.json"), "--train-iters", "3") == 0
