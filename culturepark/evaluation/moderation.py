"""Moderation: a model says of texts what people said of them, with nothing but the question to go by.

It answers as the assistant of the text's culture. The text is quoted, so that what it says is neither an
instruction nor an option. Where the endpoint tells log-probabilities each option stands in each place
once; elsewhere one reply is drawn a text. Figures are macro-F1 and the F1 of each class.

Where options come out level, as for a model that goes by their place, a class is drawn among them: so that
model guesses, which is what it reaches elsewhere and in the tasks where level options share.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np

from culturepark.cultures import Culture
from culturepark.evaluation.asking import Answer, Asker, Question
from culturepark.evaluation.labelled import LabelledSet
from culturepark.evaluation.measure import Measurement, statistic_named
from culturepark.evaluation.statistics import Ints
from culturepark.prompts.training_rows import assistant_of, judged_of

TASK = "moderation"
_REPLIES = 1
"""Sampled replies a text: sets are large, and over their texts options change places anyway."""
_GUESSES = 200
"""Times that the model which guesses is tried."""


def questions_of(of: LabelledSet, cultures: Mapping[str, Culture]) -> list[Question]:
    """One a text. Ids begin with the culture, and tell a text by its row in the file."""
    return [
        Question(
            f"{row.culture}/{of.task.name}/{row.number}",
            assistant_of(cultures[row.culture].demonym),
            judged_of(of.task.prompt, row.text),
            tuple(of.task.classes.values()),
        )
        for row in of.rows
    ]


async def evaluate(
    asker: Asker, sets: Sequence[LabelledSet], cultures: Mapping[str, Culture]
) -> list[Measurement]:
    """Ask about all texts and measure, set by set. Raises EndpointError."""
    found: list[Measurement] = []
    for one in sets:
        found += measurements(one, await asker.ask_all(questions_of(one, cultures), sampled=_REPLIES))
    return found


def measurements(of: LabelledSet, answers: Sequence[Answer]) -> list[Measurement]:
    """Figures of one set, from one answer a text: macro-F1, and F1 of each class that is there."""
    truth = np.array([row.label for row in of.rows])
    units = tuple(f"{row.culture}/{of.task.name}/{row.number}" for row in of.rows)
    said = [said_in(answer, unit) for answer, unit in zip(answers, units, strict=True)]
    values = tuple((float(row.label), float(one)) for row, one in zip(of.rows, said, strict=True))
    level = sum(len(answer.likeliest) > 1 for answer in answers)
    notes = (*of.notes, *([_level_note(of.task.name, level, len(answers))] if level else []))
    draws = sum(answer.draws for answer in answers)
    invalid = sum(answer.invalid * answer.draws for answer in answers)
    found: list[Measurement] = []

    def add(metric: str, statistic: str, **parameters: object) -> None:
        found.append(
            Measurement(
                task=TASK,
                subset=of.task.name,
                metric=metric,
                better="higher",
                unit="text",
                units=units,
                values=values,
                n=sum(answer.shares is not None for answer in answers),
                draws=draws,
                invalid_rate=invalid / draws if draws else 0.0,
                statistic=statistic,
                parameters=dict(parameters),
                floors=floors_of(truth, len(of.task.classes), statistic, parameters),
                notes=notes,
            )
        )

    add("macro_f1", "macro_f1")
    for place, name in enumerate(of.task.classes):
        if (truth == place).any():
            add(f"f1 {name}", "class_f1", of=place)
    return found


def said_in(answer: Answer, unit: str) -> int:
    """The place of the class that an answer names; of level ones one is drawn, for the same text the same;
    -1 if nothing could be read."""
    places = answer.likeliest
    return random.Random(f"level:{unit}").choice(places) if places else -1


def _level_note(name: str, level: int, n: int) -> str:
    return f"{name}: of {level} of {n} texts classes came out level, and one of them was drawn."


def floors_of(
    truth: Ints, n_classes: int, statistic: str, parameters: Mapping[str, object]
) -> dict[str, float | None]:
    """Models that do not read the text: one that always says the same class (of all classes the best), one
    that guesses (the mean of many tries), and one that always says the commonest class of this set."""
    reached = statistic_named(statistic, parameters)

    def figure(said: Ints) -> float:
        return reached(np.column_stack([truth, said]).astype(float))

    rng = np.random.default_rng(0)
    same = [figure(np.full_like(truth, place)) for place in range(n_classes)]
    guesses = [figure(rng.integers(0, n_classes, len(truth))) for _ in range(_GUESSES)]
    floors = {
        "constant": max((value for value in same if not math.isnan(value)), default=math.nan),
        "random": float(np.mean(guesses)),
        "majority": same[int(np.bincount(truth, minlength=n_classes).argmax())],
    }
    return {name: None if math.isnan(value) else value for name, value in floors.items()}
