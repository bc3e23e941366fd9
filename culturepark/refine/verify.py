"""Reading a verdict out of a verifier's reply."""

from __future__ import annotations

import re
from typing import Any, cast

from msgspec import Struct

from culturepark.messages import Verdict
from culturepark.refine.extract import json_value
from culturepark.text import tidy

VERDICTS: tuple[Verdict, ...] = ("entails", "contradicts", "novel")


class Judgement(Struct, frozen=True):
    """How an opinion stands to the stance, and why.

    `score`, where the verifier gives one, is how far the deciding similarity lies from where the
    verdict would change: the larger the surer.
    """

    verdict: Verdict
    reason: str
    score: float | None = None


# Words that deny a verdict, or that report a text that asks for one (prompt injection).
_DOUBTFUL = re.compile(
    r"\b(?:not|neither|nor|never|cannot|no|ignor\w*|instruct\w*|inject\w*|command\w*|demand\w*|request\w*|"
    r"ask(?:s|ed|ing)?|told|tells|tr(?:y|ies|ied|ying)|refus\w*|pretend\w*)\b|n['\u2019]t\b"
)


def read_verdict(reply: str) -> Judgement | None:
    """The verdict in a reply; None if there is none, or more than one.

    Accepts the JSON asked for, also with words around it, or a reply that names exactly one verdict.
    Nothing is guessed: a reply that cannot be read, that denies what it names, or that reports being
    asked for it, is no verdict.
    """
    start, end = reply.find("{"), reply.rfind("}")
    if 0 <= start < end:
        try:
            value = json_value(reply[start : end + 1])
        except ValueError:
            value = None
        if isinstance(value, dict):
            fields = cast(dict[str, Any], value)
            verdict = str(fields.get("verdict", "")).strip().lower()
            if verdict in VERDICTS:
                return Judgement(verdict, tidy(str(fields.get("reason", "")))[:300])
            return None
    if _DOUBTFUL.search(reply.lower()):
        return None
    named = set(re.findall(r"\b(entails|contradicts|novel)\b", reply.lower()))
    return Judgement(cast(Verdict, named.pop()), "") if len(named) == 1 else None
