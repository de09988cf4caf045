"""Steps in order, whatever the threads do, and on from any integer."""

import itertools
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from megatron_moe.config.errors import ConfigError, DataError
from megatron_moe.data.batch import Batch, Stream
from megatron_moe.data.loader import Loader
from megatron_moe.data.sampler import Sampler


class Numbers:
    """Sample n holds the token n; takes a while that differs from one to the next."""

    def get(self, indices: Sequence[int]) -> Batch:
        time.sleep(0.002 * (indices[0] * 7 % 3))
        ids = torch.tensor(list(indices))
        tokens = ids[:, None]
        stream = Stream(tokens, tokens + 1, torch.ones(tokens.shape), torch.zeros_like(tokens), tokens.int() * 0)
        return Batch(streams={"decoder": stream}, sample_ids=ids)


class Broken(Numbers):
    def get(self, indices: Sequence[int]) -> Batch:
        if 8 in indices:
            raise DataError("sample 8 is broken")
        return super().get(indices)


def sampler(consumed: int = 0) -> Sampler:
    return Sampler(global_batch_size=4, micro_batch_size=2, consumed=consumed)


def read(loader: Loader, steps: int) -> list[list[list[int]]]:
    return [[batch.sample_ids.tolist() for batch in step] for step in itertools.islice(loader, steps)]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_the_order_does_not_depend_on_the_threads(num_workers: int) -> None:
    with Loader(Numbers(), sampler(), num_workers=num_workers) as loader:
        assert read(loader, 4) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]], [[12, 13], [14, 15]]]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_run_goes_on_from_one_integer(num_workers: int) -> None:
    with Loader(Numbers(), sampler(), num_workers=num_workers) as loader:
        whole = read(loader, 6)
    with Loader(Numbers(), sampler(), num_workers=num_workers) as loader:
        read(loader, 2)
        state = loader.state_dict()
        assert state == {"consumed_samples": 8}
    with Loader(Numbers(), sampler(consumed=8), num_workers=num_workers) as loader:
        assert read(loader, 4) == whole[2:]
    with Loader(Numbers(), sampler(), num_workers=num_workers) as loader:
        read(loader, 4)
        loader.load_state_dict(state)
        assert read(loader, 4) == whole[2:]
        with pytest.raises(ConfigError):
            loader.load_state_dict({"consumed_samples": -4})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_sample_stops_at_its_step(num_workers: int) -> None:
    with Loader(Broken(), sampler(), num_workers=num_workers) as loader:
        assert read(loader, 2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
        for _ in range(2):
            with pytest.raises(DataError, match="sample 8"):
                next(loader)
        assert loader.state_dict() == {"consumed_samples": 8}


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    with Loader(Numbers(), sampler(), num_workers=3) as loader:
        next(loader)
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_arrive_on_the_gpu(num_workers: int) -> None:
    with Loader(Numbers(), sampler(), device="cuda", num_workers=num_workers) as loader:
        batch = next(loader)[0]
        assert batch.decoder.tokens.is_cuda and batch.decoder.tokens.tolist() == [[0], [1]]
