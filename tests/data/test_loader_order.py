"""A run reads the same samples in the same order whatever the layout, the threads and the stops; and from anywhere."""

import itertools
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from goals import Trials
from ranks import run_on_ranks

from megatron_moe.config.run import RunConfig
from megatron_moe.data.build import build_datasets
from megatron_moe.data.gpt_dataset import Dataset
from megatron_moe.data.indexed_writer import IndexedDatasetWriter
from megatron_moe.data.loader import Loader
from megatron_moe.data.sampler import Sampler
from megatron_moe.data.tokenizer import NullTokenizer

LENGTH, WINDOWS, GLOBAL_BATCH = 4, 40, 16
VOCAB = 1000
FAR = 10**9
DP, WORKERS = (1, 2, 4, 8), range(5)


def dataset_of(corpus: Path, length: int = LENGTH) -> Dataset:
    config = RunConfig.from_dict(
        {
            "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": VOCAB},
            "data": {"seq_length": length, "data_path": [str(corpus)], "tokenizer_type": "NullTokenizer", "split": "1"},
            "training": {"global_batch_size": GLOBAL_BATCH, "train_iters": 10},
            "optimizer": {"lr": 1e-3},
        }
    )
    found = build_datasets(config, NullTokenizer(VOCAB))["train"]
    assert found is not None
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Token n is the number n: the first of a sample tells its window."""
    prefix = tmp_path_factory.mktemp("corpus") / "counted"
    with IndexedDatasetWriter(prefix, dtype=np.dtype(np.uint16)) as writer:
        for piece in np.array_split(np.arange(LENGTH * WINDOWS + 1), 13):
            writer.add_document(piece)
        writer.finish()
    found = dataset_of(prefix)
    assert found.num_samples == WINDOWS
    return found


def read(dataset: Dataset, steps: int, *, dp: int, workers: int, micro: int = 1, consumed: int = 0) -> list[list[int]]:
    """(number of the sample, its tokens ...) in the order of the global batches, put together from all ranks."""
    ranks = []
    for rank in range(dp):
        sampler = Sampler(global_batch_size=GLOBAL_BATCH, micro_batch_size=micro, dp_rank=rank, dp_size=dp)
        with Loader(dataset, sampler, num_workers=workers) as loader:
            loader.load_state_dict({"consumed_samples": consumed})
            ranks.append(list(itertools.islice(loader, steps)))
            assert loader.state_dict() == {"consumed_samples": consumed + steps * GLOBAL_BATCH}
    found = []
    for step in range(steps):
        # microbatch by microbatch over the ranks
        for batch in itertools.chain(*zip(*(rank[step] for rank in ranks), strict=True)):
            rows = zip(batch.sample_ids.tolist(), batch.decoder.tokens.tolist(), strict=True)
            found += [[number, *tokens] for number, tokens in rows]
    return found


def windows_of(rows: list[list[int]]) -> list[int]:
    """Which window each sample is; all of its tokens must be that window's."""
    assert all(row[1:] == list(range(row[1], row[1] + LENGTH)) and row[1] % LENGTH == 0 for row in rows)
    return [row[1] // LENGTH for row in rows]


@pytest.mark.goal("R33", ci=20, nightly=20, what="DP 1, 2, 4, 8 x 0 to 4 workers: one order, each window once an epoch")
def test_the_order_depends_on_neither_ranks_nor_workers(dataset: Dataset, trials: Trials) -> None:
    epochs, steps = 2, 2 * WINDOWS // GLOBAL_BATCH
    wanted = [[number, *dataset.sample(number).tokens.tolist()] for number in range(epochs * WINDOWS)]
    windows = windows_of(wanted)
    assert windows[:WINDOWS] != windows[WINDOWS:]
    for epoch in range(epochs):
        assert sorted(windows[epoch * WINDOWS : (epoch + 1) * WINDOWS]) == list(range(WINDOWS))
    for (dp, workers), _ in zip(itertools.product(DP, WORKERS), trials, strict=True):
        assert read(dataset, steps, dp=dp, workers=workers) == wanted, (dp, workers)


@pytest.mark.timeout(7200)
@pytest.mark.goal("R12", ci=50, nightly=5000, what="stopped, gone on with other ranks: no sample twice, none left out")
def test_no_sample_is_repeated_or_skipped_when_the_ranks_change(dataset: Dataset, trials: Trials) -> None:
    for _, rng in trials:
        start = rng.choice((0, FAR)) + rng.randrange(1000)
        found: list[list[int]] = []
        for _ in range(3):
            dp, micro = rng.choice(DP), rng.choice((1, 2))
            consumed, steps = start + len(found), rng.randint(1, 2)
            found += read(dataset, steps, dp=dp, micro=micro, workers=rng.choice((0, 2)), consumed=consumed)
        numbers = range(start, start + len(found))
        assert [row[0] for row in found] == list(numbers)
        assert found == [[number, *dataset.sample(number).tokens.tolist()] for number in numbers]


def test_a_far_epoch_is_a_permutation_too(dataset: Dataset) -> None:
    start = FAR // WINDOWS * WINDOWS
    steps = -(-WINDOWS // GLOBAL_BATCH)
    found = windows_of(read(dataset, steps, dp=2, workers=2, consumed=start))[:WINDOWS]
    assert sorted(found) == list(range(WINDOWS))


def write_huge(prefix: Path, tokens: int) -> None:
    """Two documents of `tokens` each, all zeros: a file with a hole, and an index beside it."""
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * tokens * 2)
    parts = (
        b"MMIDIDX\x00\x00",
        (1).to_bytes(8, "little") + bytes([8]),  # version; uint16
        np.array([2, 3], np.uint64).tobytes(),
        np.array([tokens, tokens], np.int32).tobytes(),
        np.array([0, tokens * 2], np.int64).tobytes(),
        np.array([0, 1, 2], np.int64).tobytes(),
    )
    prefix.with_suffix(".idx").write_bytes(b"".join(parts))


def resume_far(rank: int, world_size: int, prefix: Path) -> tuple[list[int], int, float, int]:
    """Samples read, samples of an epoch, seconds and kB of further memory, from nothing opened to a batch read."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    dataset = dataset_of(prefix, length=2)
    sampler = Sampler(global_batch_size=GLOBAL_BATCH, micro_batch_size=GLOBAL_BATCH)
    with Loader(dataset, sampler, num_workers=2) as loader:
        loader.load_state_dict({"consumed_samples": FAR})
        (batch,) = next(loader)
    took = time.monotonic() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return batch.sample_ids.tolist(), dataset.num_samples, took, memory


@pytest.mark.goal("R33", ci=1, nightly=1, what="opened and read at sample 10^9 of a corpus that large: soon, in 50 MB")
def test_a_run_goes_on_at_sample_a_billion(tmp_path: Path, trials: Trials) -> None:
    write_huge(tmp_path / "huge", 11 * FAR // 10)
    ((numbers, epoch, seconds, kilobytes),) = run_on_ranks(1, resume_far, tmp_path / "huge")
    assert numbers == list(range(FAR, FAR + GLOBAL_BATCH)) and epoch > FAR
    trials.notes["at sample 10^9 (s)"] = round(seconds, 3)
    trials.notes["further memory (MB)"] = round(kilobytes / 1024, 1)
    # one second on a quiet machine
    assert seconds < 10 and kilobytes < 50 * 1024
    trials.add(1)
