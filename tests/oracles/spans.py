"""Span corruption and prefixes once more, with lists: T5's rules, one token after the other."""

from itertools import count

from tests.oracles.draw import place, uniform, uniform_row


def num_noise(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Tokens of noise, and spans of them."""
    noise = round(length * density)
    return noise, round(noise / mean_span)


def lengths(inputs: int, density: float, mean_span: float) -> tuple[int, int]:
    """Raw tokens and target tokens, by trying every number: the most whose input has exactly `inputs` tokens."""
    found = []
    for raw in count(1):
        noise, spans = num_noise(raw, density, mean_span)
        if raw - noise + spans + 1 == inputs:
            found.append((raw, noise + spans + 1))
        elif raw - noise + spans + 1 > inputs:
            break
    # at one half, T5 prefers targets that are not longer than the input
    if density == 0.5 and len(found) > 1 and found[-1][1] > inputs:
        return found[-2]
    return found[-1]


def segmentation(items: int, parts: int, where: int, number: int) -> list[int]:
    """Sizes of `parts` segments, none empty: a new one begins after the items with the smallest draws."""
    draws = uniform_row(where, number, items - 1)
    ends = sorted(sorted(range(items - 1), key=lambda item: draws[item])[: parts - 1])
    sizes, start = [], 0
    for end in [*ends, items - 1]:
        sizes.append(end + 1 - start)
        start = end + 1
    return sizes


def noise_mask(length: int, density: float, mean_span: float, seed: int, name: str, number: int) -> list[bool]:
    """True where a token of sample `number` is noise."""
    noise, spans = num_noise(length, density, mean_span)
    stream = f"samples/{name}"
    kept = segmentation(length - noise, spans, place(seed, 0, stream, 0, 0), number)
    cut = segmentation(noise, spans, place(seed, 0, stream, 0, 1), number)
    mask: list[bool] = []
    for few, many in zip(kept, cut, strict=True):
        mask += [False] * few + [True] * many
    return mask


def corrupted(tokens: list[int], mask: list[bool], first_sentinel: int, end: int) -> tuple[list[int], list[int]]:
    """Input and target: whoever is not spoken to gets a sentinel at the start of the other's turn."""
    texts: dict[bool, list[int]] = {False: [], True: []}
    turns = {False: 0, True: 0}
    previous: bool | None = None
    for token, noise in zip(tokens, mask, strict=True):
        if noise is not previous:
            texts[not noise].append(first_sentinel - turns[noise])
            turns[noise] += 1
        texts[noise].append(token)
        previous = noise
    return [*texts[False], end], [*texts[True], end]


def prefix_lengths(segments: list[int], seed: int, name: str, number: int) -> dict[int, int]:
    """Tokens of the prefix of each document of a sample: 0 to all but one."""
    found = {}
    for document in sorted(set(segments)):
        share = uniform(place(seed, 0, f"samples/{name}", 0, document), number)
        found[document] = int(share * segments.count(document))
    return found
