"""Random shapes, rectangles and tilings."""

import random

from megatron_moe.checkpoint.reshard import Rectangle


def random_shape(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 4)))


def random_rectangle(rng: random.Random, shape: tuple[int, ...]) -> Rectangle:
    offset = tuple(rng.randrange(length) for length in shape)
    return Rectangle(offset, tuple(rng.randint(1, length - start) for start, length in zip(offset, shape, strict=True)))


def random_tiling(rng: random.Random, shape: tuple[int, ...], cuts: int = 8) -> list[Rectangle]:
    """The whole, cut again and again at random places, in random order."""
    tiles = [Rectangle.whole(shape)]
    for _ in range(rng.randint(0, cuts)):
        tile = tiles.pop(rng.randrange(len(tiles)))
        wide = [dim for dim, length in enumerate(tile.shape) if length > 1]
        if not wide:
            tiles.append(tile)
            continue
        dim = rng.choice(wide)
        cut = rng.randint(1, tile.shape[dim] - 1)
        upper = tuple(length - cut if d == dim else length for d, length in enumerate(tile.shape))
        lower = tuple(cut if d == dim else length for d, length in enumerate(tile.shape))
        begin = tuple(start + cut if d == dim else start for d, start in enumerate(tile.offset))
        tiles += [Rectangle(tile.offset, lower), Rectangle(begin, upper)]
    rng.shuffle(tiles)
    return tiles
