"""Which questions are held out of training: by question, never by row, and the same for every culture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def held_out_questions(questions: Iterable[str], seed: int, share: float) -> frozenset[str]:
    """The ids of the questions that no training row may be about.

    Questions are put in the order of a hash of their id and the run's seed, and the first `share` of them
    (rounded) is held out: it follows from the questions alone, not from what was generated. Of two
    questions or more at least one is held out and one is not, unless `share` is 0.
    """
    ids = sorted(set(questions), key=lambda question: _rank(question, seed))
    if share <= 0 or len(ids) < 2:
        return frozenset()
    return frozenset(ids[: min(max(1, round(share * len(ids))), len(ids) - 1)])


def _rank(question: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{question}".encode()).digest()
