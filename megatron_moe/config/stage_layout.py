"""The string of --pipeline-model-parallel-layout, in Megatron's notation: what each pipeline stage holds.

    layout = item*      item = ( letter | "|" | "(" layout ")" ) [ "*" number ]      letter = E | e | t | L

Stages are parted by |; E is the embedding, e a layer of the encoder, t one of the decoder, L the head with the loss.
Commas and spaces mean nothing: "Et*3|(tt|)*29,t|L" is Ettt, 29 stages of two layers, one of one, and the head alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_moe.config.errors import ConfigError

FLAG = "--pipeline-model-parallel-layout"
LETTERS = "EetL"
KNOWN = "use E (embedding), e and t (a layer of encoder and decoder), L (loss), | between stages, (...)*n and x*n"


@dataclass(frozen=True)
class Mark:
    """A letter or a bar, and where it stands in the string, counted from 1."""

    letter: str
    place: int


def stage_contents(text: str) -> list[str]:
    """The letters of each stage, written out.  Raises ConfigError, with the place, for what is no layout.

    The first stage begins with E and the last one ends with L; none is empty; e stands before t.
    """
    marks = _Reader(text).marks()
    stages: list[list[Mark]] = [[]]
    bar = Mark("|", 1)
    for mark in marks:
        if mark.letter != "|":
            stages[-1].append(mark)
            continue
        if not stages[-1]:
            _refuse(text, mark.place, "ends a stage that holds nothing; give it a layer, or leave it out")
        stages.append([])
        bar = mark
    if not stages[-1]:
        _refuse(text, bar.place, "is followed by nothing; end the last stage with L")
    _check_order(text, [mark for stage in stages for mark in stage])
    return ["".join(mark.letter for mark in stage) for stage in stages]


def _check_order(text: str, marks: Sequence[Mark]) -> None:
    """Embedding, encoder, decoder, loss."""
    if marks[0].letter != "E":
        _refuse(text, marks[0].place, "comes first; the first stage begins with E, the embedding")
    if marks[-1].letter != "L":
        _refuse(text, marks[-1].place, "comes last; the last stage ends with L, the loss")
    for before, mark in zip(marks, marks[1:], strict=False):
        if mark.letter == "E":
            _refuse(text, mark.place, "is a second embedding; where a decoder follows an encoder it embeds by itself")
        if before.letter == "L":
            _refuse(text, before.place, "is not the end; only the last stage ends with L")
        if (before.letter, mark.letter) == ("t", "e"):
            _refuse(text, mark.place, "is a layer of the encoder behind one of the decoder; write e before t")


class _Reader:
    """Goes through the string once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def marks(self) -> list[Mark]:
        """All of it, repetitions written out."""
        found = self._sequence()
        if self._next() is not None:
            _refuse(self._text, self._at + 1, "closes nothing; leave it out")
        if not found:
            raise ConfigError(f"{FLAG} {self._text!r} is empty; {KNOWN}.")
        return found

    def _next(self) -> str | None:
        """The character that is read next; None at the end."""
        while self._at < len(self._text) and self._text[self._at] in ", ":
            self._at += 1
        return self._text[self._at] if self._at < len(self._text) else None

    def _sequence(self) -> list[Mark]:
        """Up to the end, or to a closing bracket."""
        found: list[Mark] = []
        while (letter := self._next()) is not None and letter != ")":
            self._at += 1
            place = self._at
            found += (self._group(place) if letter == "(" else [self._mark(letter, place)]) * self._times()
        return found

    def _group(self, place: int) -> list[Mark]:
        inner = self._sequence()
        if self._next() != ")":
            _refuse(self._text, place, "is never closed; write ) behind what belongs together")
        self._at += 1
        return inner

    def _mark(self, letter: str, place: int) -> Mark:
        if letter == "m":
            _refuse(self._text, place, "is multi-token prediction, which there is none of here; leave it out")
        if letter not in LETTERS and letter != "|":
            _refuse(self._text, place, f"means nothing; {KNOWN}")
        return Mark(letter, place)

    def _times(self) -> int:
        """The number behind a *, 1 without one."""
        if self._next() != "*":
            return 1
        self._at += 1
        place = self._at
        self._next()
        start = self._at
        while self._at < len(self._text) and self._text[self._at].isdecimal():
            self._at += 1
        digits = self._text[start : self._at]
        if not digits or int(digits) < 1:
            _refuse(self._text, place, "wants a number of 1 or more behind it")
        return int(digits)


def _refuse(text: str, place: int, problem: str) -> NoReturn:
    raise ConfigError(f"{FLAG} {text}: {text[place - 1]!r} at character {place} {problem}.")
