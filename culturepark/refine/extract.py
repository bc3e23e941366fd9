"""From a turn to its opinions: reading what an extractor replied, and finding the spans."""

from __future__ import annotations

import json
import re
from typing import Any, cast

from msgspec import Struct

from culturepark.text import sentences, tidy

MAX_OPINIONS = 12
"""More opinions of one turn than this are not believed."""


class Found(Struct, frozen=True):
    """An opinion and the span of the turn it comes from."""

    text: str
    start: int
    end: int


_ANAPHORIC = re.compile(
    r"^(?:it|its|this|that|they|their|these|those|such|and|but|so|because|which|he|she|there|then|also|otherwise)\b",
    re.IGNORECASE,
)


def sentences_as_opinions(turn: str) -> list[Found]:
    """The sentences of a turn, word for word: no words are added.

    A sentence that refers to the one before it (anaphora: "It ...", "They ...", "And ...") stays with it,
    since by itself it would not say what it is about.
    """
    spans: list[tuple[int, int]] = []
    for start, end in sentences(turn):
        if spans and _ANAPHORIC.match(turn[start:end]) and "\n" not in turn[spans[-1][1] : start]:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return [Found(_unlisted(turn[a:b]), a, b) for a, b in spans]


def read_opinions(reply: str, turn: str, at_most: int = MAX_OPINIONS) -> list[Found] | None:
    """The first `at_most` opinions in an extractor's reply; None if it cannot be read.

    Accepts the JSON asked for, also in a code fence or with words around it, a bare JSON list, or a
    list with numbers or dashes. A quote that is not in the turn gives the span of the whole turn.
    """
    items = _from_json(reply)
    if items is None:
        items = _from_list(reply)
    if items is None:
        return None
    found: list[Found] = []
    for opinion, quote in items[:at_most]:
        text = tidy(opinion).replace("\n", " ")
        if text:
            start, end = _span(turn, quote.strip() or opinion)
            found.append(Found(text, start, end))
    return found


def json_value(text: str) -> Any:
    """What a reply's JSON says; halves of surrogate pairs, which models write at times, are let through
    for `tidy` to mend. Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _from_json(reply: str) -> list[tuple[str, str]] | None:
    for candidate in _json_parts(reply):
        try:
            value = json_value(candidate)
        except ValueError:
            continue
        if isinstance(value, dict):
            value = cast(dict[str, Any], value).get("opinions")
        if not isinstance(value, list):
            continue
        items = [_pair(item) for item in cast(list[Any], value)]
        return None if None in items else [item for item in items if item is not None]
    return None


def _pair(item: Any) -> tuple[str, str] | None:
    """Opinion and quote of one item of the list."""
    if isinstance(item, str):
        return item, ""
    if not isinstance(item, dict):
        return None
    fields = cast(dict[str, Any], item)
    opinion, quote = fields.get("opinion"), fields.get("quote")
    if not isinstance(opinion, str):
        return None
    return opinion, quote if isinstance(quote, str) else ""


def _json_parts(reply: str) -> list[str]:
    """The whole reply, then what stands between its outermost brackets."""
    parts = [reply.strip()]
    for opening, closing in ("{}", "[]"):
        start, end = reply.find(opening), reply.rfind(closing)
        if 0 <= start < end:
            parts.append(reply[start : end + 1])
    return parts


_LISTED = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*\u2022])\s+(.+)$")


def _from_list(reply: str) -> list[tuple[str, str]] | None:
    lines = [match.group(1) for line in reply.split("\n") if (match := _LISTED.match(line))]
    return [(line, "") for line in lines] or None


def _unlisted(text: str) -> str:
    match = _LISTED.match(text)
    return (match.group(1) if match else text).strip()


def _span(turn: str, quote: str) -> tuple[int, int]:
    for words in (quote.strip(), quote.strip(" .")):
        if not words:
            continue
        if (at := turn.find(words)) >= 0:  # as it nearly always is, and no pattern has to be made
            return at, at + len(words)
        # Not by lowering both: some letters change their length with their case.
        if match := re.search(re.escape(words), turn, re.IGNORECASE):
            return match.span()
    return 0, len(turn)
