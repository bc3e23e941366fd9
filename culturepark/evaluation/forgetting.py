"""Forgetting: what a model can do in general, before it is tuned and after.

A small set of our own, in plain English and of no culture, asked without any system message. It needs no
download and detects a large loss; it is no measure of how able a model is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from msgspec import Struct
from msgspec.structs import replace

from culturepark.evaluation.asking import Answer, Asker, Question, counts_of
from culturepark.evaluation.data_files import data_rows
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
    return tuple(
        Item(
            f"{row['ability']}-{number}",
            row["ability"],
            row["question"],
            tuple(row[one] for one in _OPTIONS),
        )
        for number, row in enumerate(data_rows("abilities.csv"), 1)
    )


def questions_of(items: Sequence[Item], cultures: Sequence[str]) -> list[Question]:
    """The items, once for each culture; without cultures, once. Where each culture has a model of its own,
    the beginning of the id chooses it; all models are asked in the same orders of options."""
    return [
        Question(f"{culture}/{item.id}" if culture else item.id, "", item.question, item.options, item.id)
        for culture in cultures or ("",)
        for item in items
    ]


async def evaluate(
    asker: Asker, items: Sequence[Item], cultures: Sequence[str], per_culture: bool
) -> list[Measurement]:
    """Ask everything: each culture's model if there is one `per_culture`, else the only one. Raises
    EndpointError."""
    questions = questions_of(items, cultures if per_culture else ())
    answers = await asker.ask_balanced(questions)
    rounds = [answers[start : start + len(items)] for start in range(0, len(answers), len(items))]
    by_culture = dict(zip(cultures, rounds if per_culture else rounds * len(cultures), strict=True))
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
    by_item = [[answers[place] for answers in rounds] for place in places]
    counts = counts_of([answer for answers in by_item for answer in answers])
    chance = sum(1 / len(items[place].options) for place in places) / len(places)
    return Measurement(
        task=TASK,
        subset=subset,
        metric="accuracy",
        better="higher",
        unit="item",
        units=tuple(items[place].id for place in places),
        values=tuple((_score(answers),) for answers in by_item),
        n=counts.n,
        draws=counts.draws,
        invalid_rate=counts.invalid_rate,
        # Orders are balanced, so a model that always chooses the same place is right as often as by chance.
        floors={"constant": chance, "random": chance},
    )


def _score(answers: Sequence[Answer]) -> float | None:
    """The mean credit of the right option over all readable answers; None if none is readable."""
    credits = [credit[0] for answer in answers if (credit := answer.credit) is not None]
    return sum(credits) / len(credits) if credits else None
