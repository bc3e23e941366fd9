"""Values Survey Module: people of a culture, as a model plays them, answer 24 questions.

One call for each person and item. The warnings of the module's manual hold here too and go with every result:
see `WARNINGS`.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from culturepark.cultures import Culture, Persona, describe, draw_persona
from culturepark.errors import ConfigError
from culturepark.evaluation import hofstede
from culturepark.evaluation.asking import Answer, Asker, Question, counts_of
from culturepark.evaluation.data_files import read_data
from culturepark.evaluation.hofstede import CODES, DIMENSIONS, N_ITEMS
from culturepark.evaluation.measure import Better, Measurement, rows_of, statistic_named
from culturepark.evaluation.statistics import Floats, none_if_nan

TASK = "vsm"
MIN_PEOPLE = 50
"""The least number of people in a group: the manual's ideal; below twenty it calls no figure meaningful."""
MIN_ANSWERS = 20
"""The least number of people that each item is asked of, where not every person is asked all items."""
ITEMS_EACH = tuple(each for each in range(1, N_ITEMS + 1) if N_ITEMS % each == 0)
"""The numbers of items that one person may be asked: the divisors of 24."""

WARNINGS = (
    "Indices describe groups of people, never one person.",
    "Only differences between groups asked in the same way mean something: the constants are fitted here, "
    "each culture's on the others, and indices of other studies cannot be set beside these.",
    "Groups should be alike in all but their culture; a model's people are alike by construction and real "
    "ones are not.",
    "The dimensions were found between countries; the items of one dimension need not hang together within "
    "a country, and studies that repeated the module found them hardly to.",
)
"""The warnings that go with every result, in our own words, after the manual of the module and what was found
with it since."""

_COLUMNS = ("item", "question", *(f"option_{code}" for code in CODES))


class Item(Struct, frozen=True):
    """One question; the option at place i is code i + 1."""

    number: int
    question: str
    options: tuple[str, ...]


class Group(Struct, frozen=True):
    """The people of one culture, the places of the items that each of them is asked, and the published row
    they are compared with."""

    culture: Culture
    people: tuple[Persona, ...]
    asked: tuple[tuple[int, ...], ...]

    @property
    def published(self) -> tuple[float | None, ...]:
        """Six published figures; all None if the culture names no row."""
        table = hofstede.published_table()
        return table.get(self.culture.hofstede_row, (None,) * len(DIMENSIONS))

    @property
    def stand_in(self) -> bool:
        """Whether the row is a region's, in place of the culture's own country."""
        return self.culture.hofstede_row in hofstede.regions()


def read_items(path: Path | None = None) -> tuple[Item, ...]:
    """The 24 items, the built-in ones or those of the user's file (CSV: item, question, option_1 ...
    option_5).

    Raises ConfigError naming what is missing.
    """
    where = str(path or "the built-in items")
    fix = f"It needs the columns {', '.join(_COLUMNS)} and a line for each item from 1 to {N_ITEMS}."
    try:
        text = path.read_text("utf-8-sig") if path is not None else read_data("vsm_items.csv")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(where, f"it cannot be read: {error}.", fix) from None
    reader = csv.DictReader(text.splitlines())
    if missing := [column for column in _COLUMNS if column not in (reader.fieldnames or ())]:
        raise ConfigError(where, f"it has no column {missing[0]}.", fix)
    items: dict[int, Item] = {}
    for row in reader:
        cells = {column: (row[column] or "").strip() for column in _COLUMNS}
        if not cells["item"].isdigit() or not 1 <= int(cells["item"]) <= N_ITEMS:
            continue  # the module's questions on the person are not scored
        number, options = int(cells["item"]), tuple(cells[f"option_{code}"] for code in CODES)
        if not all((cells["question"], *options)) or len(set(options)) < len(options):
            what = f"item {number} lacks words, or has the same option twice."
            raise ConfigError(where, what, fix)
        if number in items:
            raise ConfigError(where, f"item {number} stands there twice.", fix)
        items[number] = Item(number, cells["question"], options)
    if absent := [number for number in range(1, N_ITEMS + 1) if number not in items]:
        raise ConfigError(where, f"item {absent[0]} is missing.", fix)
    return tuple(items[number] for number in range(1, N_ITEMS + 1))


def groups_of(
    cultures: Sequence[Culture], people: int, rng_seed: int = 0, items_each: int = N_ITEMS
) -> list[Group]:
    """`people` personas a culture, as many women as men; the same seed gives the same people.

    With fewer than all `items_each`, each person is asked a part of the items (matrix sampling, as large
    surveys do): parts are drawn so that each item is asked equally often, but for one time. Raises
    ConfigError below fifty people, and if an item would be asked of too few.
    """
    if people < MIN_PEOPLE:
        what = f"{people} people are too few for an index."
        raise ConfigError("--people", what, f"Use at least {MIN_PEOPLE} of each culture.")
    if items_each not in ITEMS_EACH:
        what = f"{N_ITEMS} items cannot be shared out evenly by {items_each}."
        raise ConfigError("--items-each", what, f"Use one of {', '.join(map(str, ITEMS_EACH))}.")
    if (asked := people * items_each // N_ITEMS) < MIN_ANSWERS:
        what = f"each item would be asked of {asked} people of a culture."
        fix = f"Ask more items or more people: at least {MIN_ANSWERS} have to answer each item."
        raise ConfigError("--items-each", what, fix)
    groups: list[Group] = []
    for culture in cultures:
        rng = random.Random(f"vsm:{rng_seed}:{culture.id}")
        drawn = tuple(draw_persona(culture, "woman" if n % 2 == 0 else "man", rng) for n in range(people))
        groups.append(Group(culture, drawn, _parts(people, items_each, rng)))
    return groups


def _parts(people: int, items_each: int, rng: random.Random) -> tuple[tuple[int, ...], ...]:
    """Places of the items that each person is asked: all in a drawn order, cut into parts, and again."""
    parts: list[tuple[int, ...]] = []
    while len(parts) < people:
        order = rng.sample(range(N_ITEMS), N_ITEMS)
        parts += [tuple(sorted(order[at : at + items_each])) for at in range(0, N_ITEMS, items_each)]
    return tuple(parts[:people])


def questions_of(groups: Sequence[Group], items: Sequence[Item]) -> list[Question]:
    """Each person is asked their items, culture by culture, person by person."""
    return [
        Question(
            f"{group.culture.id}/{number}/{items[place].number}",
            f"You are {describe(person, group.culture)}. Answer as this person would.",
            items[place].question,
            items[place].options,
            affinity=f"{group.culture.id}/{number}",
        )
        for group in groups
        for number, (person, places) in enumerate(zip(group.people, group.asked, strict=True))
        for place in places
    ]


async def evaluate(asker: Asker, groups: Sequence[Group], items: Sequence[Item]) -> list[Measurement]:
    """Ask each person each of its items once and measure. Raises EndpointError."""
    return measurements(groups, await asker.ask_all(questions_of(groups, items), 1))


def measurements(groups: Sequence[Group], answers: Sequence[Answer]) -> list[Measurement]:
    """Figures of all cultures together and of each, from one answer a question, in the order of
    `questions_of`.

    An answer by log-probabilities counts with its mean code. An item that a person was not asked is missing.
    """
    people = len(groups[0].people)
    asked = _asked(groups)
    values = np.full(asked.shape, np.nan)
    values[asked] = [_code(answer) for answer in answers]
    ends = np.cumsum(asked.sum(axis=(1, 2)))
    per_culture = [answers[begin:end] for begin, end in pairwise((0, *ends))]
    published = [group.published for group in groups]
    notes = list(WARNINGS)
    notes += [
        f'{g.culture.id}: "{g.culture.hofstede_row}" stands in for {g.culture.country}.'
        for g in groups
        if g.stand_in
    ]
    units = [f"person-{number}" for number in range(people)]
    if (each := len(groups[0].asked[0])) < N_ITEMS:
        # Another name, so that no person is paired with one who was asked all items: means of fewer answers
        # have a larger error.
        units = [f"{unit}/{each}" for unit in units]
        notes.append(
            f"Each person was asked {each} of the {N_ITEMS} items, each item as often but for one time. "
            "Error and distance rise with fewer answers: set them beside their own floors, and beside what "
            "was asked alike."
        )
    found: list[Measurement] = []
    rows = rows_of(_by_person(values).T.tolist())
    asked_rows = _by_person(np.where(asked, 1.0, np.nan))

    def add(subset: str, metric: str, statistic: str, of: Sequence[Answer], **parameters: object) -> None:
        counts = counts_of(of)
        found.append(
            Measurement(
                task=TASK,
                subset=subset,
                metric=metric,
                better=_BETTER.get(metric, "neither"),
                unit="person",
                units=tuple(units),
                values=rows,
                n=counts.n,
                draws=counts.draws,
                invalid_rate=counts.invalid_rate,
                statistic=statistic,
                parameters=dict(parameters),
                floors=_floors(statistic, parameters, asked_rows) if metric in _BETTER else {},
                notes=tuple(notes),
            )
        )

    add("all", "rmse", "vsm_rmse", answers, published=published)
    add("all", "rank_correlation", "vsm_spearman", answers, published=published)
    add("all", "euclid", "vsm_euclid", answers, published=published)
    for number, (group, of) in enumerate(zip(groups, per_culture, strict=True)):
        add(group.culture.id, "rmse", "vsm_rmse", of, published=published, culture=number)
        for place, dimension in enumerate(DIMENSIONS):
            add(group.culture.id, dimension, "vsm_index", of, culture=number, dimension=place)
    return found


_BETTER: dict[str, Better] = {"rmse": "lower", "rank_correlation": "higher", "euclid": "lower"}


def _floors(statistic: str, parameters: dict[str, object], asked: Floats) -> dict[str, float | None]:
    """Of a model that always chooses the middle answer, and of one that chooses at random, where `asked` is 1
    and not NaN. There is no majority floor, since shares of the answers are not published."""
    figure = statistic_named(statistic, parameters)
    rng = np.random.default_rng(0)
    at_random = float(np.mean([figure(asked * rng.integers(1, 6, asked.shape)) for _ in range(50)]))
    return {"constant": none_if_nan(figure(3.0 * asked)), "random": none_if_nan(at_random)}


def _asked(groups: Sequence[Group]) -> NDArray[np.bool_]:
    """Which person was asked which item, shape (cultures, people, items); in the order of the questions."""
    asked = np.zeros((len(groups), len(groups[0].people), N_ITEMS), dtype=np.bool_)
    for number, group in enumerate(groups):
        for person, places in enumerate(group.asked):
            asked[number, person, list(places)] = True
    return asked


def _by_person(values: Floats) -> Floats:
    """A row a person, culture by culture in it."""
    return values.transpose(1, 0, 2).reshape(values.shape[1], -1)


def _code(answer: Answer) -> float:
    if answer.shares is None:
        return math.nan
    return float(np.dot(answer.shares, CODES))
