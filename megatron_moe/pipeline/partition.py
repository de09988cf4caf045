"""Which layers stand in which stage."""


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """Layers as even as possible; the middle stages take one more first, since the ends embed and project.

    Raises ValueError when a stage would have none.
    """
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} pipeline stages")
    quotient, rest = divmod(num_layers, num_stages)
    order = sorted(range(num_stages), key=lambda stage: (stage == num_stages - 1, stage == 0, stage))
    sizes = [quotient + (stage in order[:rest]) for stage in range(num_stages)]
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
