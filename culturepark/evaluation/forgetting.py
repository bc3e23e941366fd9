"""Forgetting: what a model can do in general, before it is tuned and after.

A small set of our own, in plain English and of no culture, asked without any system message. It needs no
download and tells a large loss; it is no measure of how able a model is.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

from msgspec import Struct
from msgspec.structs import replace

from culturepark.evaluation.asking import Answer, Asker, Question
from culturepark.evaluation.measure import Measurement

TASK = "forgetting"
_OPTIONS = ("answer", "other_1", "other_2", "other_3")


class Item(Struct, frozen=True):
    """One question; the first option is right."""

    id: str
    ability: str
    question: str
    options: tuple[str, ...]


@cache
def read_items() -> tuple[Item, ...]:
    """The built-in set."""
    text = resources.files("culturepark.evaluation").joinpath("data/abilities.csv").read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    return tuple(
        Item(
            f"{row['ability']}-{number}",
            row["ability"],
            row["question"],
            tuple(row[one] for one in _OPTIONS),
        )
        for number, row in enumerate(rows, 1)
    )


def questions_of(items: Sequence[Item], cultures: Sequence[str]) -> list[Question]:
    """The items, once for each culture; for none, once. A model that is one for each culture finds its own
    by the beginning of the id; all are asked in the same orders of options."""
    return [
        Question(f"{culture}/{item.id}" if culture else item.id, "", item.question, item.options, item.id)
        for culture in cultures or ("",)
        for item in items
    ]


async def evaluate(
    asker: Asker, items: Sequence[Item], cultures: Sequence[str], apart: bool
) -> list[Measurement]:
    """Ask everything, of each culture's model if they are `apart`, else once. Raises EndpointError."""
    asked = questions_of(items, cultures if apart else ())
    answers = await asker.ask_each(asked)
    rounds = [answers[at : at + len(items)] for at in range(0, len(answers), len(items))]
    by_culture = dict(zip(cultures, rounds if apart else rounds * len(cultures), strict=True))
    return measurements(items, rounds, by_culture)


def measurements(
    items: Sequence[Item], rounds: Sequence[Sequence[Answer]], by_culture: Mapping[str, Sequence[Answer]]
) -> list[Measurement]:
    """Accuracy by ability, by culture and in all.

    `rounds` hold one answer an item each. The unit is the item, whose score is the mean over the rounds:
    however many models answer, there are no more questions than these. So a model that was asked once and
    one that is several are compared item by item.
    """
    subsets = {
        ability: [place for place, item in enumerate(items) if item.ability == ability]
        for ability in dict.fromkeys(item.ability for item in items)
    }
    every = list(range(len(items)))
    found = [_accuracy(items, rounds, ability, places) for ability, places in subsets.items()]
    found += [
        replace(_accuracy(items, [answers], culture, every), restated=len(rounds) == 1)
        for culture, answers in by_culture.items()
    ]
    return [*found, _accuracy(items, rounds, "all", every)]


def _accuracy(
    items: Sequence[Item], rounds: Sequence[Sequence[Answer]], subset: str, places: Sequence[int]
) -> Measurement:
    answers = [[answers[place] for answers in rounds] for place in places]
    flat = [answer for of in answers for answer in of]
    draws = sum(answer.draws for answer in flat)
    at_random = sum(1 / len(items[place].options) for place in places) / len(places)
    return Measurement(
        task=TASK,
        subset=subset,
        metric="accuracy",
        better="higher",
        unit="item",
        units=tuple(items[place].id for place in places),
        values=tuple((_score(of),) for of in answers),
        n=sum(answer.shares is not None for answer in flat),
        draws=draws,
        invalid_rate=sum(answer.invalid * answer.draws for answer in flat) / draws if draws else 0.0,
        # Whoever always takes the same place meets the right option there as often as at random.
        floors={"constant": at_random, "random": at_random},
    )


def _score(answers: Sequence[Answer]) -> float | None:
    """1 if the right option is the likeliest, a part of it where several are, the mean of all readable
    answers."""
    read = [parts[0] for answer in answers if (parts := answer.parts) is not None]
    return sum(read) / len(read) if read else None
