"""Saying the same again: whether a turn repeats an earlier one of its dialogue, or goes round in circles.

    earlier = Earlier(texts of the turns before)
    earlier.again(text, number)                 # "repeated", "looping", or None
    earlier.add(text, number)

Every turn of every dialogue passes here, and most share no sentence with what came before; that has to be
found out without looking at what came before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

from culturepark.text import words

END_CHARS = 32
"""Characters at the beginning and the end of a turn that are remembered: two turns of one sentence
that differ in a word or two share one of them."""
SENTENCE_CHARS = 20
"""A shorter sentence may come back in any number of turns, and no shorter turn is called repeated."""
TIMES = 3
"""Said so often, a sentence, or a turn, is a loop."""
ALIKE = 0.65
"""Share of pairs of words, of all that two texts have, that both of them have: one word in twelve may
differ, and somebody who only begins as before stays well below it."""

_PLACES_FROM_CHARS = 128
"""Shorter texts are compared word by word at once."""
_PLACES, _PLACE_CHARS, _PLACES_SHARED = 16, 16, 8
"""Of so many places of a text, of so many letters each, so many are in a text that is alike. By trial: of
13,024 English texts that were alike, with one word in eight to twelve exchanged, one had fewer."""
_RUN_ON_CHARS = 300
_DISTINCT = 0.5


class Earlier:
    """What was said in a dialogue so far, whoever said it. Of each sentence, each beginning and each end it
    is known which turns have it, by hashes: some kilobytes a dialogue."""

    __slots__ = ("_having", "_texts")

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._texts: list[str] = []
        self._having: dict[int, int] = {}
        """By a part's hash: bit i says that text i has it."""
        for number, text in enumerate(texts, 1):
            self.add(text, number)

    def add(self, text: str, number: int) -> None:
        """Remember turn `number`, the first of which is 1; one that is known is not taken again."""
        if number <= len(self._texts):
            return
        bit, having = 1 << len(self._texts), self._having
        for part in (*_sentences(text), *_ends(text)):
            key = hash(part)
            having[key] = having.get(key, 0) | bit
        self._texts.append(text)

    def again(self, text: str, number: int) -> Literal["repeated", "looping"] | None:
        """Whether this text of turn `number` says again what was said in turns before it.

        `looping`: one sentence three times, in it or over turns; a third turn of nearly the same words; or
        words that go round in circles. `repeated`: nearly the same words as an earlier turn.
        """
        own = _sentences(text)
        if _goes_round(text, own):
            return "looping"
        having, before = self._having, (1 << (number - 1)) - 1
        parts = (*own, *_ends(text))
        known = {part: turns for part in parts if (turns := having.get(hash(part), 0) & before)}
        if not known:
            return None
        for part in own:
            if len(part) >= SENTENCE_CHARS and known.get(part, 0).bit_count() >= TIMES - 1:
                return "looping"
        alike = sum(_alike(text, self._texts[at], common) for at, common in _by_turn(known))
        if alike >= TIMES - 1:
            return "looping"
        return "repeated" if alike else None


def _by_turn(known: dict[str, int]) -> Iterator[tuple[int, list[str]]]:
    """The turns that have any of these parts, and which."""
    turns = 0
    for having in known.values():
        turns |= having
    while turns:
        bit = turns & -turns
        turns ^= bit
        yield bit.bit_length() - 1, [part for part, having in known.items() if having & bit]


def _sentences(text: str) -> list[str]:
    low = text.lower()
    if not low.isascii():
        for stop in "\u3002\uff01\uff1f\u061f\u06d4\u0964":
            low = low.replace(stop, ". ")
    if "?" in low:
        low = low.replace("? ", ". ")
    if "!" in low:
        low = low.replace("! ", ". ")
    if "\n" in low:
        low = low.replace("\n", ". ")
    return [sentence.strip(" .!?") for sentence in low.split(". ")]


def _ends(text: str) -> tuple[str, str]:
    return text[:END_CHARS].lower(), text[-END_CHARS:].lower()


# --- within one turn -----------------------------------------------------------------------------------


def _goes_round(text: str, own: Sequence[str]) -> bool:
    distinct = set(own)
    if len(own) - len(distinct) >= TIMES - 1 and any(
        own.count(one) >= TIMES for one in distinct if words(one) >= TIMES
    ):
        return True
    return (
        len(text) > _RUN_ON_CHARS and len(longest := max(own, key=len)) > _RUN_ON_CHARS and _circles(longest)
    )


def _circles(sentence: str) -> bool:
    """Whether a very long sentence says few things over and over."""
    parts = _parts(sentence)
    return len(set(zip(parts, parts[1:], parts[2:], strict=False))) < _DISTINCT * (len(parts) - 2)


# --- two turns -----------------------------------------------------------------------------------------


def _alike(text: str, other: str, common: Sequence[str]) -> bool:
    """Whether two texts are nearly the same, which have these parts in common."""
    if len(text) < SENTENCE_CHARS:
        return False
    # Comparing word by word is dear. In a text of several sentences one in common is not yet a sign of it;
    # where sentences, or words, cannot be told apart for certain it is.
    if text.isascii():
        ends = _ends(text)
        if not any(part in ends for part in common) and 2 * sum(map(len, common)) < len(text):
            return False
        if other.isascii() and not _shares_places(text, other):
            return False
    return _resemblance(text, other) >= ALIKE


def _shares_places(text: str, other: str) -> bool:
    shorter, longer = sorted((text.lower().translate(_FLAT), other.lower().translate(_FLAT)), key=len)
    if len(shorter) < _PLACES_FROM_CHARS:
        return True
    step = len(shorter) // (_PLACES + 1)
    shared = 0
    for at in range(step, step * _PLACES + 1, step):
        shared += shorter[at : at + _PLACE_CHARS] in longer
    return shared >= _PLACES_SHARED


def _resemblance(text: str, other: str) -> float:
    """Of all pairs of parts that follow each other, the share that both texts have."""
    a, b = _pairs(text), _pairs(other)
    both = len(a & b)
    return both / max(1, len(a) + len(b) - both)


def _pairs(text: str) -> set[tuple[str, str]]:
    parts = _parts(text)
    return set(pairwise(parts))


def _parts(text: str) -> list[str]:
    """Words; where words are not apart, each letter and the next one."""
    parts = text.lower().translate(_MARKS).split()
    if len(text) > _LONG_WORD * len(parts):
        letters = "".join(parts)
        return [letters[i : i + 2] for i in range(len(letters) - 1)]
    return parts


_MARKS = str.maketrans("", "", ".,;:!?\"'()\u3002\uff0c\uff01\uff1f\u060c\u061f\u0964")
_FLAT = _MARKS | {ord("\n"): " "}
_LONG_WORD = 12
