"""How long the two sequences of span corruption are, so that neither is padded.  [T5, arXiv:1910.10683, 3.1.4]"""

from bisect import bisect_right


def corrupted_lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Input and target of `length` raw tokens, each with its end token.

    A sentinel stands for each span of noise in the input, and before it in the target.
    """
    noise = round(length * density)
    spans = round(noise / mean_span)
    return length - noise + spans + 1, noise + spans + 1


def raw_length(input_length: int, density: float, mean_span: float) -> int:
    """The most raw tokens whose corrupted input has `input_length` tokens.  T5: 512 -> 568.

    With spans of one token or more, a raw token more makes the input longer by one or by none: no length is left out.
    """

    def inputs(length: int) -> int:
        return corrupted_lengths(length, density, mean_span)[0]

    high = input_length
    while inputs(high) <= input_length:
        high *= 2
    length = bisect_right(range(high), input_length, key=inputs) - 1
    # T5's own exception, so that both sequences have a length that hardware likes; not where it would leave a gap
    even = density == 0.5 and corrupted_lengths(length, density, mean_span)[1] > input_length
    return length - 1 if even and inputs(length - 1) == input_length else length


def fits(length: int, density: float, mean_span: float) -> bool:
    """Whether so many raw tokens can be cut: each span of noise follows a token that is kept."""
    noise = round(length * density)
    return length >= 2 and 1 <= round(noise / mean_span) <= length - noise
