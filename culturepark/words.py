"""Numbers, amounts, durations and a decoder's complaints in words, as all output says them."""

from __future__ import annotations

import re
from collections.abc import Iterable


def count(number: float) -> str:
    """A count with thousands apart: `12,345`."""
    return f"{round(number):,}"


def money(amount: float | None, local: bool = False) -> str:
    """Money in the currency of the configured prices; `unknown` where nothing is known."""
    if local:
        return "none (local)"
    if amount is None:
        return "unknown"
    return f"{amount:,.2f}" if amount >= 1 or amount == 0 else f"{amount:.4f}"


def clock(seconds: float) -> str:
    """A duration as `4:05` or `1:04:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plural(number: int, one: str, many: str = "") -> str:
    """`1 dialogue`, `2 dialogues`."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is spelt most like `word`, as a question and a space; empty if none is near."""
    import difflib  # only errors need it

    near = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean `{near[0]}`? " if near else ""


_TYPES = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "date": "a date",
}


def decoder_in_words(what: str) -> str:
    """What msgspec says is wrong with a value, without its jargon: "this must be text, not a list"."""
    what = re.sub(r"^Object missing required field `(\w+)`", r"`\1` is missing", what)
    what = re.sub(
        r"^Invalid enum value '.*'(?= \(it is)|^Invalid enum value '.*'$", "this is no choice", what
    )
    what = re.sub(r"^Expected ", "this must be ", what)
    what = re.sub(r", got `(\w+)`", lambda m: f", not {_TYPES.get(m.group(1), m.group(1))}", what)
    return re.sub(
        r"`(\w+(?: \| \w+)*)`",
        lambda m: " or ".join(
            _TYPES.get(part, f"`{part}`") for part in m.group(1).split(" | ") if part != "null"
        ),
        what,
    )
