"""A persona's stance: which answer it holds, and how a persona that holds it would begin to speak."""

from __future__ import annotations

import math
import random
from typing import Literal

from msgspec import Struct

from culturepark.errors import SeedError
from culturepark.seeds.model import Answers, Seed, Side

DrawMethod = Literal["distribution", "mode", "paper"]

# How often something is, from the survey's first code to its last, said so that a clause with
# "that" can follow.
_HOW_COMMON = (
    "it is very common",
    "it is fairly common",
    "it does not often happen",
    "it is almost unheard of",
)
_HOW_OFTEN = (
    "it is very often the case",
    "it is quite often the case",
    "it is seldom the case",
    "it is hardly ever the case",
)

_I = ("I ", "I'", "I\u2019")

_LEAD_INS = ("around", "as", "at", "even", "if", "in", "near", "on", "thanks", "when", "without")
"""First words of a phrase that comes ahead of the main clause and ends in a comma."""


class Stance(Struct, frozen=True):
    """One answer as a person's view.

    `share` is the share of the country's valid answers that gave it. `opening` is how such a person
    would begin, ending in ", because", fit to start a reply with. `summary` tells a persona its
    view in the second person.
    """

    code: int
    label: str
    side: Side | None
    share: float
    opening: str
    summary: str


def draw(
    seed: Seed,
    answers: Answers,
    method: DrawMethod,
    rng: random.Random,
    weighted: bool = False,
) -> int:
    """The option code that one persona holds.

    `distribution` draws by share, so that minority views come up as often as people hold them.
    `mode` is the most common answer, the lower code of two equals. `paper` is the mean of the
    codes cut down to a whole number, as the published reference of CulturePark (arXiv 2405.15145)
    does, but over valid answers only: there, codes of missing answers went into the mean. Nominal
    options have no mean, so `paper` is the mode of them.

    `weighted` uses weighted shares where there are any. Draws one number from `rng` for
    `distribution` and none otherwise. Raises SeedError if the question was not asked there.
    """
    shares = answers.weighted_shares if weighted and answers.weighted_shares else answers.shares
    held = sorted((code, share) for code, share in shares.items() if share > 0)
    if not held:
        raise SeedError(
            seed.id,
            f"it was never asked in {answers.country}.",
            "Plan no dialogue for this culture and seed.",
        )
    if method == "distribution":
        return _drawn(held, rng.random())
    if method == "mode" or seed.scale == "nominal":
        return max(held, key=lambda pair: (pair[1], -pair[0]))[0]
    total = math.fsum(share for _, share in held)
    # Published shares are rounded: a mean of 2 may come out as 1.999998, and is not to be cut to 1.
    mean = round(math.fsum(code * share for code, share in held) / total, 4)
    codes = [option.code for option in seed.options]
    return min(max(int(mean), min(codes)), max(codes))


def stance_of(seed: Seed, answers: Answers, code: int) -> Stance:
    """The stance of a persona that gives this answer. Raises KeyError if the seed has no such option."""
    return Stance(
        code=code,
        label=_label(seed, code),
        side=seed.side(code),
        share=answers.shares.get(code, 0.0),
        opening=f"{_opening(seed, code)}, because",
        summary=_summary(seed, code),
    )


def _drawn(held: list[tuple[int, float]], point: float) -> int:
    point *= math.fsum(share for _, share in held)
    for code, share in held:
        point -= share
        if point < 0:
            return code
    return held[-1][0]


def _label(seed: Seed, code: int) -> str:
    label = seed.option(code).label
    if seed.scale != "agree10" or not label.isdigit():
        return label
    # A bare point of a ten-point scale says nothing without its ends.
    first, last = min(seed.options, key=lambda o: o.code), max(seed.options, key=lambda o: o.code)
    return f"{label}, from {first.code} ({first.label}) to {last.code} ({last.label})"


def _is_strong(seed: Seed, code: int) -> bool:
    codes = sorted(option.code for option in seed.options)
    from_the_end = min(code - codes[0], codes[-1] - code)
    return from_the_end < {"agree3": 0, "agree10": 2}.get(seed.scale, 1)


def _frequency(seed: Seed, code: int) -> str:
    codes = sorted((option.code for option in seed.options), reverse=seed.toward == "high")
    return (_HOW_COMMON if seed.scale == "frequency4" else _HOW_OFTEN)[codes.index(code)]


def _opening(seed: Seed, code: int) -> str:
    if seed.scale == "nominal":
        return f'My answer is "{seed.option(code).label}"'
    clause = _clause(seed.statement, seed)
    if seed.scale in ("frequency4", "often4"):
        return _how_often(clause, _frequency(seed, code))
    side, strong = seed.side(code), _is_strong(seed, code)
    if side == "between":
        return _joined("I am in two minds about whether", clause)
    if side == "against" and not seed.negation:
        return _joined(f"I {'strongly disagree' if strong else 'do not agree'} that", clause)
    opposite = _clause(seed.negation or "", seed)
    if seed.scale == "entitled4":
        lead = "It is clear to me that" if strong else "On balance I think that"
        return _joined(lead, clause if side == "for" else opposite)
    if side == "for":
        return _joined(f"I {'strongly agree' if strong else 'agree'} that", clause)
    return _joined(f"I {'strongly believe' if strong else 'think'} that", opposite)


def _how_often(clause: str, how_often: str) -> str:
    # "Around where I live, people get robbed": the place reads better ahead of the "how often".
    place, comma, event = clause.partition(", ")
    if comma and _has_lead_in(clause):
        return f"I would say that, {place}, {how_often} that {event}"
    return f"I would say that {how_often} that {clause}"


def _joined(words: str, clause: str) -> str:
    return f"{words}, {clause}" if _has_lead_in(clause) else f"{words} {clause}"


def _has_lead_in(clause: str) -> bool:
    return clause.split(" ", 1)[0].lower() in _LEAD_INS and ", " in clause


def _clause(sentence: str, seed: Seed) -> str:
    """A sentence made fit to follow "that": no full stop, and no capital unless it is a name's."""
    text = sentence.strip().rstrip(".!").rstrip()
    first, _, rest = text.partition(" ")
    elsewhere = f" {rest} {seed.statement.partition(' ')[2]} {(seed.negation or '').partition(' ')[2]} "
    is_name = (
        text.startswith(_I)
        or any(letter.isupper() for letter in first[1:])  # an acronym, or the like
        or (rest[:1].isupper() and not rest.startswith(_I))  # a name of two words
        or f" {first.rstrip(',')} " in elsewhere  # written with a capital within a sentence too
    )
    return text if is_name else text[:1].lower() + text[1:]


def _summary(seed: Seed, code: int) -> str:
    """The view in the second person. The statement stays quoted: some speak in the first person."""
    quoted = f'"{seed.statement.strip()}"'
    if seed.scale == "nominal":
        return f'Asked {quoted}, you answer "{seed.option(code).label}".'
    if seed.scale in ("frequency4", "often4"):
        return f"You were asked how often this is so: {quoted} As you see it, {_frequency(seed, code)}."
    side, firmly = seed.side(code), "strongly " if _is_strong(seed, code) else ""
    if side == "between":
        return f"You are in two minds about this statement and see both sides of it: {quoted}"
    if side == "for":
        return f"You {firmly}agree with this statement: {quoted}"
    opposite = f' Your own view is rather: "{seed.negation.strip()}"' if seed.negation else ""
    return f"You {firmly}disagree with this statement: {quoted}{opposite}"
