"""Every layout and micro-batch size reads the same samples in each step, each once."""

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.data.sampler import Sampler


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_all_ranks_together_read_each_sample_of_the_step_once(dp_size: int, micro_batch_size: int) -> None:
    samplers = [
        Sampler(global_batch_size=16, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size, consumed=32)
        for rank in range(dp_size)
    ]
    for step in range(3):
        # microbatch by microbatch over the ranks, the samples stand in order
        microbatches = zip(*(sampler.microbatches() for sampler in samplers), strict=True)
        order = [sample for ranks in microbatches for samples in ranks for sample in samples]
        assert order == list(range(32 + 16 * step, 48 + 16 * step))
        for sampler in samplers:
            sampler.advance()


def test_a_rank_takes_consecutive_samples() -> None:
    sampler = Sampler(global_batch_size=12, micro_batch_size=2, dp_rank=1, dp_size=2, consumed=0)
    assert [list(samples) for samples in sampler.microbatches()] == [[2, 3], [6, 7], [10, 11]]
    assert sampler.num_microbatches == 3
    sampler.advance()
    assert [list(samples) for samples in sampler.microbatches()] == [[14, 15], [18, 19], [22, 23]]


@pytest.mark.parametrize(("global_batch", "micro", "dp"), [(10, 4, 1), (8, 2, 3), (0, 1, 1), (8, 16, 1), (8, 0, 1)])
def test_batches_that_do_not_divide_are_refused(global_batch: int, micro: int, dp: int) -> None:
    with pytest.raises(ConfigError, match="--global-batch-size"):
        Sampler(global_batch_size=global_batch, micro_batch_size=micro, dp_size=dp)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1"):
        Sampler(global_batch_size=1, micro_batch_size=1, consumed=-1)


def test_samples_that_are_left_out_are_read_by_no_step_on_any_layout() -> None:
    left_out = [range(8), range(16, 24), range(24, 28)]
    for dp_size in (1, 2):
        read: list[int] = []
        samplers = [
            Sampler(global_batch_size=4, micro_batch_size=2, dp_rank=rank, dp_size=dp_size, left_out=left_out)
            for rank in range(dp_size)
        ]
        for _ in range(4):
            read += sorted(sample for sampler in samplers for part in sampler.microbatches() for sample in part)
            for sampler in samplers:
                sampler.advance()
        assert read == [*range(8, 16), *range(28, 36)]
