"""Texts with gaps to ids and back, and the tool that fills them."""

from pathlib import Path

import pytest

from megatron_moe.config.errors import DataError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.tokenizer import ByteTokenizer
from megatron_moe.inference.generate import Generator
from megatron_moe.inference.sampling import Sampling
from megatron_moe.inference.sentinels import Sentinels
from tests.inference.test_encoder_decoder import runs
from tests.inference.test_generate_tool import STATE, save
from tests.inference.tiny_models import CPU
from tools import generate

EOD = ByteTokenizer.eod_id
SENTINELS = Sentinels(ByteTokenizer(), 10)


def test_sentinels_count_down_from_the_highest_id() -> None:
    assert SENTINELS.encode("a<extra_id_0>bc<extra_id_9>") == [97, 266, 98, 99, 257, EOD]
    assert SENTINELS.encode("<extra_id_1>") == [265, EOD]
    assert SENTINELS.decode([266, 98, 99, 265, 100]) == "<extra_id_0>bc<extra_id_1>d"
    with pytest.raises(DataError, match=r"<extra_id_10> is none of this model's 10 sentinels .*; use <extra_id_0> to"):
        SENTINELS.encode("<extra_id_10>")


def test_a_tokenizer_without_an_end_of_a_document_is_refused() -> None:
    endless = ByteTokenizer()
    endless.eod_id = None  # type: ignore[assignment]
    with pytest.raises(DataError, match="this tokenizer has none; give the one"):
        Sentinels(endless, 10).encode("a")


def gap_run() -> RunConfig:
    tables = runs()[0].to_dict()
    tables["model"]["vocab_size"] = None
    tables["data"] |= {"tokenizer_type": "ByteTokenizer", "objective": "span_corruption", "vocab_extra_ids": 10}
    return RunConfig.from_dict(tables, origin="checkpoint")


def test_the_tool_reads_gaps_and_says_what_fills_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ByteTokenizer.vocab_size + 10
    run = gap_run()
    folder = save(tmp_path / "ckpt", run, size=size)
    prompts = ["import os<extra_id_0>main", "x"]
    asked = ["--load", str(folder), "--max-new-tokens", "6", "--temperature", "2.0", "--seed", "4"]
    assert generate.main([*asked, "--prompt", *prompts]) == 0
    shown = capsys.readouterr().out
    model = generate.load_model(folder, state=STATE)
    generator = Generator(model.stages, STATE, model.spec, CPU, start_id=EOD)
    ids = [SENTINELS.encode(prompt) for prompt in prompts]
    answers = generator.generate(ids, 6, Sampling(temperature=2.0), eod_id=EOD, seed=4)
    texts = [SENTINELS.decode(answer) for answer in answers]
    assert model.spec.vocab_size == size
    assert shown == f"{texts[0]}\n{'-' * 40}\n{texts[1]}\n"
