"""Opinions: a model's answers to survey questions compared with people's.

For each culture and question the model answers as that culture's assistant, and its distribution over
the options is compared with that of the people asked there. The questions have to be held out: answers to
questions that a model was tuned on say nothing about what it learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct

from culturepark.cultures import Culture
from culturepark.evaluation import statistics as stats
from culturepark.evaluation.asking import Answer, Asker, Question, counts_of
from culturepark.evaluation.measure import Better, Measurement, rows_of
from culturepark.prompts.training_rows import assistant_of, question_of
from culturepark.seeds.model import Seed

TASK = "opinions"
Shares = tuple[float, ...]

_METRICS: tuple[tuple[str, Better], ...] = (
    ("js", "lower"),
    ("emd", "lower"),
    ("entropy", "near 1"),
)


class SurveyQuestion(Struct, frozen=True):
    """One survey question of one culture: the people's shares, in the order of the seed's options."""

    culture: str
    seed: Seed
    people: Shares
    others: Shares | None
    """The mean of the other cultures' people; None if no other culture was asked."""

    @property
    def id(self) -> str:
        """Names the unit."""
        return f"{self.culture}/{self.seed.id}"


def survey_questions(seeds: Sequence[Seed], cultures: Sequence[Culture]) -> list[SurveyQuestion]:
    """Every pair of culture and question that people were asked; weighted shares where there are any."""
    found: list[SurveyQuestion] = []
    for seed in seeds:
        by_culture = {c.id: seed.people(c.survey_keys) for c in cultures}
        people = {culture: shares for culture, shares in by_culture.items() if shares is not None}
        for culture, shares in people.items():
            rest = [other for key, other in people.items() if key != culture]
            others = tuple(float(one) for one in np.mean(rest, axis=0)) if rest else None
            found.append(SurveyQuestion(culture, seed, shares, others))
    return found


async def evaluate(
    asker: Asker, survey: Sequence[SurveyQuestion], cultures: Mapping[str, Culture], draws: int | None = None
) -> list[Measurement]:
    """Ask all questions and measure, by culture and in all. Raises EndpointError."""
    questions = [
        Question(
            one.id,
            assistant_of(cultures[one.culture].demonym),
            question_of(one.seed),
            tuple(option.label for option in one.seed.options),
        )
        for one in survey
    ]
    return measurements(survey, await asker.ask_all(questions, draws))


def measurements(survey: Sequence[SurveyQuestion], answers: Sequence[Answer]) -> list[Measurement]:
    """Figures by culture and of all, from one answer to each question asked.

    The unit is the question, also of all cultures together: they are asked the same ones, so their answers
    to one are drawn together (cluster bootstrap).
    """
    pairs = list(zip(survey, answers, strict=True))
    cultures = list(dict.fromkeys(one.culture for one in survey))
    subsets = {culture: [p for p in pairs if p[0].culture == culture] for culture in cultures}
    if len(subsets) > 1:
        subsets["all"] = pairs
    return [
        _measured(subset, metric, better, of)
        for subset, of in subsets.items()
        for metric, better in _METRICS
        if any(_applies(metric, one) for one, _ in of)
    ]


def _applies(metric: str, one: SurveyQuestion) -> bool:
    return metric != "emd" or one.seed.scale != "nominal"  # the distance needs ordered options


def _measured(
    subset: str, metric: str, better: Better, pairs: Sequence[tuple[SurveyQuestion, Answer]]
) -> Measurement:
    pairs = [pair for pair in pairs if _applies(metric, pair[0])]
    cultures = list(dict.fromkeys(one.culture for one, _ in pairs))
    distances = {(one.seed.id, one.culture): distance(metric, a.shares, one.people) for one, a in pairs}
    questions = tuple(dict.fromkeys(one.seed.id for one, _ in pairs))
    counts = counts_of([answer for _, answer in pairs])
    return Measurement(
        task=TASK,
        subset=subset,
        metric=metric,
        better=better,
        unit="question",
        units=questions,
        values=rows_of([[distances.get((one, culture)) for one in questions] for culture in cultures]),
        n=counts.n,
        draws=counts.draws,
        invalid_rate=counts.invalid_rate,
        statistic="mean_of_cells",
        parameters={"columns": cultures},
        floors=_floors(metric, [one for one, _ in pairs]),
    )


def _floors(metric: str, survey: Sequence[SurveyQuestion]) -> dict[str, float | None]:
    """Baselines that know nothing of a culture: one that always picks the same place of the scale (of
    first, middle and last the best), one that picks at random, one that always gives the answer most
    people of the culture give, one that answers as the people of the other cultures do."""

    def figure(shares: Sequence[Shares | None]) -> float | None:
        distances = [distance(metric, mine, one.people) for mine, one in zip(shares, survey, strict=True)]
        defined = [value for value in distances if value is not None and not math.isnan(value)]
        return float(np.mean(defined)) if defined else None

    sizes = [len(one.people) for one in survey]
    constants = [figure([_all_on(round(at * (n - 1)), n) for n in sizes]) for at in (0.0, 0.5, 1.0)]
    known = [value for value in constants if value is not None]
    ideal = 1.0 if metric == "entropy" else 0.0
    best = min(known, key=lambda value: abs(value - ideal), default=None)
    return {
        "constant": best,
        "random": figure([(1 / n,) * n for n in sizes]),
        "majority": figure([_all_on(int(np.argmax(one.people)), len(one.people)) for one in survey]),
        "others": figure([one.others for one in survey]),
    }


def distance(metric: str, model: Sequence[float] | None, people: Sequence[float]) -> float | None:
    """One metric of one question; None where the model gave no answer."""
    if model is None:
        return None
    functions = {"js": stats.jensen_shannon, "emd": stats.earth_mover, "entropy": stats.entropy_ratio}
    return functions[metric](model, people)


def _all_on(place: int, n: int) -> Shares:
    return tuple(float(at == place) for at in range(n))
