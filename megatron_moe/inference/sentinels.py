"""Texts with gaps, and what fills them: <extra_id_0>, <extra_id_1>, ... as T5 spells them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.config.errors import DataError
from megatron_moe.data.tokenizer import Tokenizer

_WORD = re.compile(r"<extra_id_(\d+)>")


@dataclass(frozen=True)
class Sentinels:
    """The ids after those of a tokenizer's text: the first sentinel has the highest."""

    tokenizer: Tokenizer
    count: int

    def encode(self, text: str) -> list[int]:
        """A text, closed by the end of a document.

        Raises DataError for a sentinel that the model does not have, or a tokenizer without such an end.
        """
        pieces = _WORD.split(text)
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            ids += [self._id(int(piece))] if place % 2 else self.tokenizer.encode(piece)
        if self.tokenizer.eod_id is None:
            raise DataError(
                "a model that fills gaps reads texts closed by the tokenizer's end of a document, and this tokenizer "
                "has none; give the one that the model was trained with."
            )
        return [*ids, self.tokenizer.eod_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, sentinels spelt out."""
        text, run = "", []
        for token in ids:
            if token < self.tokenizer.text_size:
                run.append(token)
                continue
            text += self.tokenizer.decode(run) + f"<extra_id_{self.tokenizer.text_size + self.count - 1 - token}>"
            run = []
        return text + self.tokenizer.decode(run)

    def _id(self, number: int) -> int:
        if number >= self.count:
            raise DataError(
                f"<extra_id_{number}> is none of this model's {self.count} sentinels (--vocab-extra-ids); "
                f"use <extra_id_0> to <extra_id_{self.count - 1}>."
            )
        return self.tokenizer.text_size + self.count - 1 - number
