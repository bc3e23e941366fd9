"""What a seed is: a question, its options, and how the people of each country answered it."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import msgspec
from msgspec import Struct

SEED_ID = re.compile(r"^[a-z0-9][a-z0-9-]{0,63}$")
"""Seed ids are lower-case, and safe as a part of a file name."""

Scale = Literal["agree3", "agree4", "agree5", "agree10", "frequency4", "often4", "entitled4", "nominal"]
"""How the options read. All but `nominal` are ordered from one pole of the statement to the other."""

Side = Literal["for", "against", "between"]
"""The side of the statement that an answer is on."""


class Option(Struct, frozen=True, forbid_unknown_fields=True):
    """One answer that people could give: the survey's code and a label in our own words."""

    code: int
    label: str


class Answers(Struct, frozen=True, forbid_unknown_fields=True):
    """How the people of one country answered one question.

    `shares` maps an option's code to its share of the valid answers, and sums to 1; it is empty
    when the question was never asked there. `missing` counts the answers that hold no opinion, by
    reason; missing answers are never part of a share.
    """

    country: str
    shares: dict[int, float]
    n_valid: int | None = None
    n_missing: int | None = None
    missing: dict[str, int | float] = {}
    weighted_shares: dict[int, float] | None = None
    source: str = ""

    @property
    def asked(self) -> bool:
        """Whether there is any valid answer from there."""
        return bool(self.shares)

    def digest(self) -> str:
        """The distribution's hash: 16 hex digits that change with any share or count."""
        # msgspec sorts text keys only, so codes are spelled out first.
        plain = msgspec.to_builtins(self, str_keys=True)
        return hashlib.sha256(msgspec.json.encode(plain, order="deterministic")).hexdigest()[:16]


class Seed(Struct, frozen=True, forbid_unknown_fields=True):
    """A survey question in our own words, with people's answers by survey key.

    `answers` is keyed by what a culture's `survey_keys` name: an ISO alpha-3 code for WVS (`JOR`),
    a country label for GlobalOpinionQA (`S. Korea`). `negation` says the opposite of `statement`.
    `toward` says which end of an ordered scale agrees with the statement: the low codes or the
    high ones.
    """

    id: str
    statement: str
    options: tuple[Option, ...]
    topic: str = ""
    scale: Scale = "nominal"
    toward: Literal["low", "high"] = "low"
    negation: str | None = None
    survey: str = ""
    wave: str = ""
    answers: dict[str, Answers] = {}
    source: str = ""

    def option(self, code: int) -> Option:
        """The option with this code. Raises KeyError if the question has no such code."""
        for option in self.options:
            if option.code == code:
                return option
        raise KeyError(code)

    def side(self, code: int) -> Side | None:
        """The side of the statement that this answer is on; None when the options have no order.

        The middle is symmetric: the exact middle option of an odd scale, the two middle ones (5
        and 6) of the ten-point scale, none of a four-point scale.
        """
        if self.scale == "nominal":
            return None
        codes = sorted(option.code for option in self.options)
        middle = (codes[0] + codes[-1]) / 2
        if abs(code - middle) < (1 if self.scale == "agree10" else 0.5):
            return "between"
        return "for" if (code < middle) == (self.toward == "low") else "against"

    def answers_of(self, survey_keys: tuple[str, ...]) -> Answers | None:
        """The first distribution that one of these keys names; None when there is none."""
        for key in survey_keys:
            if key in self.answers:
                return self.answers[key]
        return None

    def people(self, survey_keys: tuple[str, ...]) -> tuple[float, ...] | None:
        """The shares of these people's answers beside the options, weighted ones where there are any; None
        if nobody was asked."""
        answers = self.answers_of(survey_keys)
        shares = (answers.weighted_shares or answers.shares) if answers else {}
        found = tuple(shares.get(option.code, 0.0) for option in self.options)
        return found if sum(found) > 0 else None
