"""The parts of the quickstart on tiny inputs; the whole tour is for people and takes minutes."""

import importlib.util
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import sentencepiece

from megatron_moe.config.run import RunConfig
from megatron_moe.data.build import build_datasets
from megatron_moe.data.indexed_writer import IndexedDatasetWriter
from megatron_moe.data.tokenizer import ByteTokenizer
from tests.end_to_end.tiny_job import tables
from tests.house.sources import ROOT


def part(name: str) -> ModuleType:
    """examples/ is no package: a file of it, by its path."""
    known = f"quickstart_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, ROOT / "examples" / "quickstart" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


# corpus


def library(root: Path) -> Path:
    """A standard library of four modules; one is not UTF-8, one is empty, some are tests."""
    for name, text in {"a.py": "x = 1\n", "json/tool.py": "ä = 2\n", "test/test_a.py": "no", "empty.py": ""}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "old.py").write_bytes("ä".encode("latin-1"))
    return root


def test_the_corpus_is_the_library_without_tests_one_document_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = part("corpus")
    root = library(tmp_path / "lib")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(root))
    assert corpus.gather(tmp_path / "out.jsonl") == (2, len("x = 1\n") + len("ä = 2\n".encode()))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {line["source"]: line["text"] for line in lines} == {"a.py": "x = 1\n", "json/tool.py": "ä = 2\n"}
    assert sorted(corpus.texts(tmp_path / "out.jsonl")) == sorted(line["text"] for line in lines)


def test_the_order_of_documents_is_that_of_a_published_hash(tmp_path: Path) -> None:
    corpus = part("corpus")
    # FNV-1a, 32 bits: the vectors of its authors
    assert [corpus.hash_of(name) for name in ("", "a", "foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]
    root = library(tmp_path)
    names = [path.relative_to(root).as_posix() for path in corpus.source_files(root)]
    assert names == sorted(["a.py", "json/tool.py", "empty.py", "old.py"], key=corpus.hash_of)


# vocabulary


DOCUMENTS = ["def f(x):\n    return x + 1\n", "for  x in  range(3):\n\tprint(x)\n\n", "# été €\n"]


def test_the_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    vocabulary = part("vocabulary")
    model = vocabulary.train_tokenizer(DOCUMENTS * 20, tmp_path / "spm", vocab_size=310)
    assert model == tmp_path / "spm.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    # characters that were never seen fall back to bytes
    for text in [*DOCUMENTS, "漢字 \u200b\n\n\n  tabs\t\t"]:
        assert processor.decode(processor.encode(text)) == text
    count = sum(len(processor.encode(text)) for text in DOCUMENTS)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    assert vocabulary.check_round_trip(model, DOCUMENTS) == pytest.approx(size / count)


def test_a_tokenizer_that_loses_blanks_is_refused(tmp_path: Path) -> None:
    vocabulary = part("vocabulary")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS * 20),
        model_prefix=str(tmp_path / "lossy"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"lossy.model: a document of 5 characters does not survive"):
        vocabulary.check_round_trip(tmp_path / "lossy.model", ["for x", "for  ", "for x"])


# yardsticks


@pytest.fixture
def byte_job(tmp_path: Path) -> RunConfig:
    """A job on 40 short texts, as bytes."""
    tokenizer = ByteTokenizer()
    with IndexedDatasetWriter(tmp_path / "bytes", dtype=np.dtype(np.uint16)) as writer:
        for number in range(40):
            writer.add_document([*tokenizer.encode(f"the cat {number} sat on the mat\n"), tokenizer.eod_id])
        writer.finish()
    found = tables(
        tmp_path / "bytes",
        data={"tokenizer_type": "ByteTokenizer", "split": "80,20,0"},
        training={"eval_interval": 12, "eval_iters": 3},
    )
    del found["model"]["vocab_size"]
    return RunConfig.from_dict(found)


def test_yardsticks_measure_the_very_tokens_of_the_validation(byte_job: RunConfig) -> None:
    found = part("yardsticks").measure(byte_job, model_loss=2.5)
    datasets = build_datasets(byte_job, ByteTokenizer())
    train, valid = datasets["train"], datasets["valid"]
    assert train is not None and valid is not None
    # 3 evaluations of 4 samples
    tokens = [int(token) for number in range(12) for token in valid.sample(number).labels]
    training = [int(token) for number in range(train.num_samples) for token in train.sample(number).labels]
    text = bytes(token for token in tokens if token != 256)
    assert (found.num_tokens, found.num_bytes) == (len(tokens), len(text)) == (96, found.num_bytes)
    counts = Counter(training)
    unigram = -sum(math.log((counts[token] + 1) / (len(training) + 257)) for token in tokens) / len(tokens)
    assert found.nats["unigram"] == pytest.approx(unigram)
    assert found.nats["bigram"] < found.nats["unigram"]
    assert found.nats["this model"] == 2.5
    assert found.bits["this model"] == pytest.approx(2.5 * len(tokens) / len(text) / math.log(2))
    assert set(found.bits) == {"this model", "bigram", "unigram", "gzip -9"}


def test_the_last_validation_loss_counts(tmp_path: Path) -> None:
    yardsticks = part("yardsticks")
    (tmp_path / "log").mkdir()
    lines = [{"step": 1, "loss": 5.0}, {"step": 1, "validation_loss": 4.0}, {"step": 2, "validation_loss": 3.0}]
    log = tmp_path / "log" / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert yardsticks.validation_loss(tmp_path) == 3.0
    log.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match="no validation loss"):
        yardsticks.validation_loss(tmp_path)


# training

# does as the trainer does: a line a step, and 75 after SIGTERM
STEPS = """
import json, pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
log = pathlib.Path(sys.argv[1]) / "log" / "metrics.jsonl"
log.parent.mkdir(exist_ok=True)
with log.open("a") as file:
    for step in range(1, int(sys.argv[2]) + 1):
        print("step", step, flush=True)
        file.write(json.dumps({"step": step, "loss": 1.0 / step}) + "\\n")
        file.flush()
        if asked:
            sys.exit(75)
        time.sleep(0.05)
"""


@dataclass(frozen=True)
class FakeJob:
    """Stands in for a torchrun job."""

    name: str
    folder: Path
    steps: int

    def command(self) -> list[str]:
        return [sys.executable, "-c", STEPS, str(self.folder), str(self.steps)]


def test_a_job_is_followed_to_its_end_and_interrupted_in_the_middle(tmp_path: Path) -> None:
    training = part("training")
    assert training.run_job(FakeJob("whole", tmp_path, 3), total_steps=3) == 0
    assert [record["step"] for record in training.records(tmp_path)] == [1, 2, 3]
    (tmp_path / "log" / "metrics.jsonl").unlink()
    interrupted = FakeJob("interrupted", tmp_path, 2000)
    assert training.run_job(interrupted, total_steps=2000, interrupt_at=4) == 75
    assert 4 <= training.records(tmp_path)[-1]["step"] < 2000
    training.expect(75, 75, interrupted)
    with pytest.raises(RuntimeError, match=r"interrupted ended with exit code 75, expected 0(.|\n)*step 4"):
        training.expect(75, 0, interrupted)


def test_records_leave_out_validation_and_the_line_that_is_being_written(tmp_path: Path) -> None:
    training = part("training")
    assert training.records(tmp_path) == []
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 1, "validation_loss": 2.0}\n{"step": 2, "lo'
    )
    assert training.records(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_job_is_started_with_the_launcher_and_the_recipe(tmp_path: Path) -> None:
    training = part("training")
    layout = ("--tensor-model-parallel-size", "2")
    words = training.Job("train-1", 4, layout, ("--save", "x y"), tmp_path).command()
    assert words[1:5] == ["-m", "megatron_moe.launch", "--nproc-per-node", "4"]
    assert words[5:] == ["-m", "megatron_moe.pretrain", "--config", str(training.RECIPE), *layout, "--save", "x y"]
    assert training.RECIPE.is_file()
