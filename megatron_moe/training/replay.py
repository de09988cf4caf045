"""What a step that was not finite says when it is played again: draws are keyed and nothing was updated.

| again            | verdict    | what follows                                                        |
|------------------|------------|---------------------------------------------------------------------|
| finite           | transient  | a device or memory has failed once: goes on with the second result  |
| the same         | persistent | data, weights or the model: stop or skip                            |
| wrong otherwise  | unstable   | the same computation gives different wrong numbers: stop or skip    |
"""

import math
from collections.abc import Sequence
from typing import Literal

from megatron_moe.training.probe import Place

Verdict = Literal["transient", "persistent", "unstable"]
# of many places, so many are told
TOLD = 4


def verdict_of(first: tuple[float, float], again: tuple[float, float]) -> Verdict:
    """first, again: (loss, gradient norm), of which the first are not both finite."""
    if all(map(math.isfinite, again)):
        return "transient"
    return "persistent" if all(map(_same, first, again)) else "unstable"


def _same(one: float, two: float) -> bool:
    return one == two or (math.isnan(one) and math.isnan(two))


def found_text(verdict: Verdict, places: Sequence[Place]) -> str:
    """One or two sentences for a person."""
    words = {
        "transient": "Played again, the step is finite: a device or its memory failed once.",
        "persistent": "Played again, the step gives the same.",
        "unstable": "Played again, the step is wrong in another way: a device or its memory is suspected.",
    }
    if not places:
        where = "" if verdict == "transient" else " No single tensor is not finite: sums of them are."
    else:
        more = f", and {len(places) - TOLD} more" if len(places) > TOLD else ""
        where = f" First not finite: {'; '.join(map(str, places[:TOLD]))}{more}."
    return words[verdict] + where
