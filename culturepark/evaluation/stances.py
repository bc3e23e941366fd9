"""Whether delegates hold the answers that their people gave: drawn stances beside the survey's shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from culturepark.evaluation import statistics as stats
from culturepark.evaluation.measure import Measurement
from culturepark.evaluation.run_data import TASK, RunData
from culturepark.evaluation.statistics import Floats

CHANCE = (
    "stance_js: `rand` is what as many people reach who are drawn at random from the survey's answers, `maj` "
    "what delegates reach who all hold the most common one."
)
_SIMULATED = 200
"""Samples of people that a floor is the mean of."""


def measurements(subset: str, made: RunData) -> list[Measurement]:
    """Drawn stances beside the people's answers, by culture and question, each weighing as many as drew."""
    drawn: dict[tuple[str, str], list[int]] = defaultdict(list)
    for talk in made.talks:
        drawn[talk.culture, talk.question] += talk.stances
    asked = {key: people_of(made, *key) for key in drawn}
    pairs = [(key, asked[key], codes) for key, codes in drawn.items() if codes and asked[key]]
    if not pairs:
        return []
    people = [np.array(list(shares.values())) for _, shares, _ in pairs]
    counts = [
        np.array([codes.count(code) for code in shares], dtype=np.float64) for _, shares, codes in pairs
    ]
    sizes = [int(count.sum()) for count in counts]
    common = [np.eye(len(shares))[int(shares.argmax())] for shares in people]
    js = [stats.jensen_shannon(mine, theirs) for mine, theirs in zip(counts, people, strict=True)]
    n = sum(sizes)
    measured = Measurement(
        task=TASK,
        subset=subset,
        metric="stance_js",
        better="lower",
        unit="question",
        units=tuple("/".join(key) for key, _, _ in pairs),
        values=tuple((one * size, float(size)) for one, size in zip(js, sizes, strict=True)),
        n=n,
        draws=n,
        invalid_rate=0.0,
        statistic="ratio",
        floors={
            "random": by_chance(people, sizes),
            "majority": _weighed(
                [stats.jensen_shannon(a, b) for a, b in zip(common, people, strict=True)], sizes
            ),
        },
        notes=(CHANCE,),
        paired=False,
        compared=False,  # the fewer drew, the further off they are by chance
    )
    return [measured]


def people_of(made: RunData, culture: str, question: str) -> dict[int, float]:
    """The people's shares by code, those that stances are drawn from; empty if nobody was asked."""
    plan = made.run.plan
    seed = next(seed for seed in plan.seeds if seed.id == question)
    answers = seed.answers_of(plan.cultures[culture].survey_keys)
    if answers is None:
        return {}
    shares = (plan.settings.weighted and answers.weighted_shares) or answers.shares
    return {option.code: shares.get(option.code, 0.0) for option in seed.options} if shares else {}


def by_chance(people: Sequence[Floats], sizes: Sequence[int]) -> float:
    """The mean divergence of as many answers as given, drawn at random from people's own."""
    rng = np.random.default_rng(0)
    found = [
        np.mean([stats.jensen_shannon(one, shares) for one in rng.multinomial(size, shares, _SIMULATED)])
        for shares, size in zip((shares / shares.sum() for shares in people), sizes, strict=True)
    ]
    return _weighed([float(one) for one in found], sizes)


def _weighed(values: Sequence[float], sizes: Sequence[int]) -> float:
    return float(np.average(values, weights=sizes))
