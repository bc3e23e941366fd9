"""Reading a verdict out of a verifier's reply."""

from __future__ import annotations

import re
from typing import Any, cast

import msgspec
from msgspec import Struct

from culturepark.messages import Verdict
from culturepark.prompts.text import tidy

VERDICTS: tuple[Verdict, ...] = ("entails", "contradicts", "novel")


class Judgement(Struct, frozen=True):
    """How an opinion stands to the stance, and why.

    `score`, where the verifier gives one, is how far the deciding similarity lies from where the
    verdict would change: the larger the surer.
    """

    verdict: Verdict
    reason: str
    score: float | None = None


def read_verdict(reply: str) -> Judgement | None:
    """The verdict in a reply; None if there is none, or more than one.

    Takes the JSON asked for, also with words around it, or a reply that names exactly one verdict.
    Nothing is guessed: a reply that cannot be read, or that denies what it names, is no verdict.
    """
    start, end = reply.find("{"), reply.rfind("}")
    if 0 <= start < end:
        try:
            value: Any = msgspec.json.decode(reply[start : end + 1])
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            value = None
        if isinstance(value, dict):
            fields = cast(dict[str, Any], value)
            verdict = str(fields.get("verdict", "")).strip().lower()
            if verdict in VERDICTS:
                return Judgement(verdict, tidy(str(fields.get("reason", "")))[:300])
            return None
    if re.search(r"\b(?:not|neither|nor|never|cannot|no)\b|n['\u2019]t\b", reply.lower()):
        return None
    named = set(re.findall(r"\b(entails|contradicts|novel)\b", reply.lower()))
    return Judgement(cast(Verdict, named.pop()), "") if len(named) == 1 else None
