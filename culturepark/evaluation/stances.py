"""Whether delegates hold the answers that their people gave: drawn stances compared with the survey's
shares."""

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
_SIMULATIONS = 200
"""The random floor is the mean over this many simulated samples of people."""


def measurements(subset: str, run_data: RunData) -> list[Measurement]:
    """The divergence of drawn stances from people's answers, by culture and question, weighted by the number
    of stances."""
    drawn: dict[tuple[str, str], list[int]] = defaultdict(list)
    for dialogue in run_data.dialogues:
        drawn[dialogue.culture, dialogue.question] += dialogue.stances
    asked = {key: people_of(run_data, *key) for key in drawn}
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
            "random": expected_by_chance(people, sizes),
            "majority": _weighted_mean(
                [stats.jensen_shannon(a, b) for a, b in zip(common, people, strict=True)], sizes
            ),
        },
        notes=(CHANCE,),
        paired=False,
        compared=False,  # with fewer stances the divergence is larger by chance
    )
    return [measured]


def people_of(run_data: RunData, culture: str, question: str) -> dict[int, float]:
    """The people's shares by code, those that stances are drawn from; empty if no people were asked."""
    plan = run_data.run.plan
    seed = next(seed for seed in plan.seeds if seed.id == question)
    answers = seed.answers_of(plan.cultures[culture].survey_keys)
    if answers is None:
        return {}
    shares = (plan.settings.weighted and answers.weighted_shares) or answers.shares
    return {option.code: shares.get(option.code, 0.0) for option in seed.options} if shares else {}


def expected_by_chance(people: Sequence[Floats], sizes: Sequence[int]) -> float:
    """The mean divergence of samples of these sizes that are drawn at random from people's own answers
    (simulated null distribution)."""
    rng = np.random.default_rng(0)
    found = [
        np.mean([stats.jensen_shannon(one, shares) for one in rng.multinomial(size, shares, _SIMULATIONS)])
        for shares, size in zip((shares / shares.sum() for shares in people), sizes, strict=True)
    ]
    return _weighted_mean([float(one) for one in found], sizes)


def _weighted_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    return float(np.average(values, weights=sizes))
