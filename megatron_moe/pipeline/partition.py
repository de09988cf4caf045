"""Which layers stand in which stage."""

from collections.abc import Sequence

from megatron_moe.config.stages import even_sizes


def parts_of(sizes: Sequence[int]) -> list[range]:
    """The layers of each stage, given how many each has; a stage without any stands between its neighbours'."""
    starts = [sum(sizes[:stage]) for stage in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """Layers as even as possible.  Raises ValueError when a stage would have none."""
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} pipeline stages")
    return parts_of(even_sizes(num_layers, num_stages))
