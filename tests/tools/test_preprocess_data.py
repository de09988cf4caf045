"""The commands around token files, as a person runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.data.indexed_dataset import IndexedDataset
from tools import inspect_dataset, merge_datasets, preprocess_data

ROOT = Path(__file__).parents[2]
BYTES = ["--tokenizer-type", "ByteTokenizer"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(30)))
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60
    )


def test_a_corpus_is_made_inspected_and_merged(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / "out"), *BYTES, "--append-eod"]
    assert preprocess_data.main([*arguments, "--log-interval", "10"]) == 0
    shown = capsys.readouterr()
    prefix = f"{tmp_path}/out_text_document"
    assert shown.out == f"30 documents, 350 tokens\n--data-path {prefix}\n"
    assert "30 documents, 350 tokens, 0 skipped, 100 % of the input" in shown.err

    assert inspect_dataset.main([prefix, "--verify", "--document", "3", "--json", *BYTES]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["documents"], found["sequences"], found["tokens"], found["dtype"]) == (30, 30, 350, "uint16")
    assert (found["shortest_sequence"], found["longest_sequence"], found["largest_token"]) == (11, 12, 256)
    assert found["text"] == ["document 3"] and found["token_ids"] == [[*b"document 3", 256]]

    assert merge_datasets.main(["--input", prefix, str(tmp_path), "--output-prefix", f"{tmp_path}/all/both"]) == 0
    assert "60 documents of 2 corpora" in capsys.readouterr().out
    assert IndexedDataset(f"{tmp_path}/all/both").num_tokens == 700
    assert merge_datasets.main(["--input", prefix, "--output-prefix", f"{tmp_path}/all/both"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert merge_datasets.main(["--input", prefix, "--output-prefix", f"{tmp_path}/all/both", "--overwrite"]) == 0
    assert IndexedDataset(f"{tmp_path}/all/both").num_tokens == 350


def test_a_broken_line_ends_with_code_65_and_one_paragraph(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with corpus.open("a") as file:
        file.write('{"text": "cut sho\n')
    arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / "out"), *BYTES]
    result = run("-O", "tools/preprocess_data.py", *arguments)
    assert result.returncode == 65 and result.stdout == ""
    assert result.stderr.startswith(f"error: {corpus}, line 31: not valid JSON")
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
    assert preprocess_data.main(arguments) == 65
    assert capsys.readouterr().err == result.stderr
    assert preprocess_data.main([*arguments, "--on-error", "skip"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("30 documents, 320 tokens, 1 records skipped\n")
    assert f"skipped {corpus}, line 31" in shown.err


def test_an_unknown_flag_ends_with_code_2(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        preprocess_data.main(["--input", str(corpus), "--output-prefix", "out", *BYTES, "--nonsense"])
    assert "--nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_output_and_no_process(kill: signal.Signals, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    line = json.dumps({"text": "x" * 2000}) + "\n"
    long.write_text(line * 1000)
    command = [
        sys.executable,
        "tools/preprocess_data.py",
        "--input",
        *[str(long)] * 2000,
        "--workers",
        "2",
        "--log-interval",
        "1000",
        *BYTES,
    ]
    command += ["--output-prefix", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert process.stderr is not None
    assert "documents" in process.stderr.readline()  # by now the workers are at it
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(kill)
    assert process.wait(timeout=30) == (-9 if kill == signal.SIGKILL else 130)
    left = {path.name for path in tmp_path.iterdir()} - {"long.jsonl"}
    assert left == ({"out_text_document.bin.partial"} if kill == signal.SIGKILL else set())
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived the command"
        time.sleep(0.05)
    process.stderr.close()
    if kill == signal.SIGKILL:
        # the next run takes over what was left
        arguments = ["--input", str(long), "--max-documents", "3", "--output-prefix", str(tmp_path / "out"), *BYTES]
        assert preprocess_data.main(arguments) == 0
        assert IndexedDataset(tmp_path / "out_text_document").num_documents == 3
        assert not (tmp_path / "out_text_document.bin.partial").exists()


def children(process: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_inspector_counts_how_often_each_id_occurs(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_dataset, "CHUNK", 7)  # several pieces
    assert preprocess_data.main(["--input", str(corpus), "--output-prefix", str(tmp_path / "out"), *BYTES]) == 0
    prefix, counts = f"{tmp_path}/out_text_document", tmp_path / "counts.npy"
    assert inspect_dataset.main([prefix, "--token-counts", str(counts), *BYTES]) == 0
    text = "".join(f"document {number}" for number in range(30)).encode()
    found = np.load(counts)
    assert found.dtype == np.int64 and len(found) == 257
    assert found.tolist() == [text.count(bytes([byte])) for byte in range(256)] + [0]
    assert f"ids_that_occur     {len(set(text))}\n" in capsys.readouterr().out
    assert inspect_dataset.main([prefix, "--token-counts", str(counts), *BYTES, "--vocab-size", "200"]) == 0
    assert len(np.load(counts)) == 200


def test_the_inspector_refuses_what_is_wrong(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocess_data.main(["--input", str(corpus), "--output-prefix", str(tmp_path / "out"), *BYTES]) == 0
    prefix = f"{tmp_path}/out_text_document"
    assert inspect_dataset.main([prefix, "--document", "30"]) == 2
    assert "--document 30 is outside 0..29" in capsys.readouterr().err
    assert inspect_dataset.main([prefix, "--verify", "--vocab-size", "100"]) == 65
    assert "expected 0 up to 99" in capsys.readouterr().err
    assert inspect_dataset.main([prefix]) == 0
    assert "documents          30\n" in capsys.readouterr().out
    assert inspect_dataset.main([prefix, "--token-counts", f"{tmp_path}/counts.txt"]) == 2
    assert "ends in .npy" in capsys.readouterr().err
    assert inspect_dataset.main([prefix, "--token-counts", f"{tmp_path}/counts.npy"]) == 2
    assert "give --vocab-size or --tokenizer-type" in capsys.readouterr().err
    assert inspect_dataset.main([prefix, "--token-counts", f"{tmp_path}/no/counts.npy", *BYTES]) == 74
    assert "cannot be written" in capsys.readouterr().err
    Path(f"{prefix}.bin").write_bytes(b"1")
    assert inspect_dataset.main([prefix]) == 65
    assert "out_text_document.bin has 1 bytes" in capsys.readouterr().err
    assert merge_datasets.main(["--input", str(tmp_path / "corpus.jsonl"), "--output-prefix", f"{tmp_path}/x"]) == 65
