"""Moderation: a model classifies texts that people have labelled, from the question alone (zero-shot).

It answers as the assistant of the text's culture. The text is quoted, so that what it says is neither an
instruction nor an option. Where the endpoint reports log-probabilities each option stands in each place
once; elsewhere one reply is drawn a text. Figures are macro-F1 and the F1 of each class.

Where options are tied, as for a model that goes by their place, one of them is drawn: so that model guesses,
which gives the score that it reaches in tasks where tied options share the credit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np

from culturepark.cultures import Culture
from culturepark.evaluation.asking import Answer, Asker, Question, counts_of
from culturepark.evaluation.labelled import LabelledSet
from culturepark.evaluation.measure import Measurement, statistic_named
from culturepark.evaluation.statistics import Ints, none_if_nan
from culturepark.prompts.training_rows import assistant_of, judged_of

TASK = "moderation"
_SAMPLED_DRAWS = 1
"""One sampled reply a text is enough: sets are large, and options change places from text to text anyway."""
_GUESSES = 200
"""The floor of a guessing model is the mean over this many simulations."""


def questions_of(of: LabelledSet, cultures: Mapping[str, Culture]) -> list[Question]:
    """One question for each text. Ids begin with the culture, and name the text by its row in the file."""
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
        answers = await asker.ask_all(questions_of(one, cultures), sampled_draws=_SAMPLED_DRAWS)
        found += measurements(one, answers)
    return found


def measurements(of: LabelledSet, answers: Sequence[Answer]) -> list[Measurement]:
    """Figures of one set, from one answer a text: macro-F1, and F1 of each class that is there."""
    truth = np.array([row.label for row in of.rows])
    units = tuple(f"{row.culture}/{of.task.name}/{row.number}" for row in of.rows)
    predicted = [predicted_class(answer, unit) for answer, unit in zip(answers, units, strict=True)]
    values = tuple((float(row.label), float(one)) for row, one in zip(of.rows, predicted, strict=True))
    ties = sum(len(answer.modes) > 1 for answer in answers)
    notes = (*of.notes, *([_tie_note(of.task.name, ties, len(answers))] if ties else []))
    counts = counts_of(answers)
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
                n=counts.n,
                draws=counts.draws,
                invalid_rate=counts.invalid_rate,
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


def predicted_class(answer: Answer, unit: str) -> int:
    """The place of the class that an answer names; of tied ones one is drawn, for the same text the same;
    -1 if nothing could be read."""
    places = answer.modes
    return random.Random(f"level:{unit}").choice(places) if places else -1


def _tie_note(name: str, ties: int, n: int) -> str:
    return f"{name}: of {ties} of {n} texts classes were tied, and one of them was drawn."


def floors_of(
    truth: Ints, n_classes: int, statistic: str, parameters: Mapping[str, object]
) -> dict[str, float | None]:
    """Baselines that do not read the text: one that always says the same class (of all classes the best), one
    that guesses (the mean of many simulations), and one that always says the commonest class of this set."""
    score = statistic_named(statistic, parameters)

    def figure(predicted: Ints) -> float:
        return score(np.column_stack([truth, predicted]).astype(float))

    rng = np.random.default_rng(0)
    same = [figure(np.full_like(truth, place)) for place in range(n_classes)]
    guesses = [figure(rng.integers(0, n_classes, len(truth))) for _ in range(_GUESSES)]
    floors = {
        "constant": max((value for value in same if not math.isnan(value)), default=math.nan),
        "random": float(np.mean(guesses)),
        "majority": same[int(np.bincount(truth, minlength=n_classes).argmax())],
    }
    return {name: none_if_nan(value) for name, value in floors.items()}
