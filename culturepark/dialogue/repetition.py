"""Saying the same again: whether a turn repeats an earlier one of its dialogue, or goes round in circles.

    earlier = Earlier(texts of the turns before)
    earlier.again(text, number)                 # "repeated", "looping", or None
    earlier.add(text, number)

Every turn of every dialogue is checked, and most share no sentence with the turns before; that is found by
hashes alone (inverted index), without reading those turns. Only candidates are compared word by word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

from culturepark.text import words

END_CHARS = 32
"""Characters at the beginning and at the end of a turn that are indexed: two turns of one sentence that
differ in a word or two share one of them."""
SENTENCE_CHARS = 20
"""Characters of the shortest sentence that makes a loop, and of the shortest turn that is called repeated."""
TIMES = 3
"""Times that a sentence, or a turn, is said to be a loop."""
ALIKE = 0.65
"""Share of two texts' pairs of words that both have, from which on they are alike (Jaccard index of bigrams):
one word in twelve may differ, and a text that only begins as the other one stays well below it."""

_PLACES_FROM_CHARS = 128
"""Characters of the shortest text that is sampled first; a shorter one is compared word by word at once."""
_PLACES, _PLACE_CHARS, _PLACES_SHARED = 16, 16, 8
"""Places of a text that are sampled, characters of each, and how many of them an alike text has at least. By
trial: of 13,024 English texts that were alike, with one word in eight to twelve exchanged, one had fewer."""
_RUN_ON_CHARS = 300
"""Characters from which a sentence is checked for going round in circles."""
_DISTINCT = 0.5
"""Share of a sentence's trigrams of words that are distinct, below which it goes round in circles."""


class Earlier:
    """The turns of a dialogue so far, of all its speakers, and by the hash of each sentence, beginning and
    end the turns that have it (inverted index): some kilobytes a dialogue."""

    __slots__ = ("_having", "_texts")

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._texts: list[str] = []
        self._having: dict[int, int] = {}
        """By a part's hash: bit i says that text i has it."""
        for number, text in enumerate(texts, 1):
            self.add(text, number)

    def add(self, text: str, number: int) -> None:
        """Index turn `number`, the first of which is 1; one that is known already is not indexed again."""
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
    # To compare word by word is costly. In a text of several sentences one in common is not yet a sign of it;
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
    """The Jaccard index of their bigrams of parts, 0 to 1."""
    a, b = _pairs(text), _pairs(other)
    both = len(a & b)
    return both / max(1, len(a) + len(b) - both)


def _pairs(text: str) -> set[tuple[str, str]]:
    parts = _parts(text)
    return set(pairwise(parts))


def _parts(text: str) -> list[str]:
    """Words; in a script without spaces between words, each character with the next one."""
    parts = text.lower().translate(_MARKS).split()
    if len(text) > _LONG_WORD * len(parts):
        letters = "".join(parts)
        return [letters[i : i + 2] for i in range(len(letters) - 1)]
    return parts


_MARKS = str.maketrans("", "", ".,;:!?\"'()\u3002\uff0c\uff01\uff1f\u060c\u061f\u0964")
_FLAT = _MARKS | {ord("\n"): " "}
_LONG_WORD = 12
"""Characters a word on average, above which a text counts as written without spaces between words."""
