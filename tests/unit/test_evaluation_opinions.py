"""Opinions: people's own distribution is at no distance, and models that know nothing at their floors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from culturepark.evaluation import opinions
from culturepark.evaluation.asking import Asker
from culturepark.evaluation.measure import Measurement, compare
from culturepark.seeds import builtin_seeds
from tests.builders import cultures
from tests.evaluation_models import OptionsModel, Shares, evenly

CULTURES = [cultures()[name] for name in ("arabic", "german", "korean")]
SEEDS = [seed for seed in builtin_seeds() if seed.id in ("wvs7-q27", "wvs7-q28", "wvs7-q29", "wvs7-q36")]
ASKED = opinions.survey_questions(SEEDS, CULTURES)


def figures(shares: Shares, draws: int = 12, **how: object) -> dict[tuple[str, str], Measurement]:
    asker = Asker(OptionsModel(shares, **how))  # type: ignore[arg-type]
    found = asyncio.run(opinions.evaluate(asker, ASKED, cultures(), draws))
    return {(one.subset, one.metric): one for one in found}


def as_people(pick: Callable[[opinions.SurveyQuestion], tuple[float, ...]]) -> Shares:
    def shares(text: str, options: list[str]) -> list[float]:
        one = next(
            a for a in ASKED if a.seed.statement in text and f" {cultures()[a.culture].demonym} " in text
        )
        labels = [option.label for option in one.seed.options]
        return [pick(one)[labels.index(option)] for option in options]

    return shares


def test_what_was_never_asked_there_is_not_asked_here() -> None:
    pairs = {(one.culture, one.seed.id) for one in ASKED}
    assert ("arabic", "wvs7-q36") not in pairs  # Jordan was never asked it
    assert len(pairs) == len(ASKED) == 11


def test_a_model_that_answers_as_people_do() -> None:
    found = figures(as_people(lambda one: one.people))
    for subset in ("arabic", "german", "korean", "all"):
        assert found[subset, "js"].interval().value == pytest.approx(0, abs=1e-9)
        assert found[subset, "emd"].interval().value == pytest.approx(0, abs=1e-9)
        assert found[subset, "entropy"].interval().value == pytest.approx(1)
    sampled = figures(as_people(lambda one: one.people), draws=200, logprobs=False)
    value = sampled["all", "js"].interval().value
    assert value is not None
    assert value < 0.005


@pytest.mark.parametrize("metric", ["js", "emd", "entropy"])
def test_models_that_know_nothing_are_at_their_floors(metric: str) -> None:
    by_random = figures(evenly)["all", metric]
    assert by_random.interval().value == pytest.approx(by_random.floors["random"])
    majority = figures(as_people(lambda one: tuple(float(p == max(one.people)) for p in one.people)))
    assert majority["all", metric].interval().value == pytest.approx(by_random.floors["majority"])
    others = figures(as_people(lambda one: one.others or ()))["all", metric]
    assert others.interval().value == pytest.approx(by_random.floors["others"])


def test_a_constant_model_is_at_the_constant_floor() -> None:
    # The same end of the scale each time: of the three constants, the first is the best on these.
    first = figures(as_people(lambda one: (1.0, *([0.0] * (len(one.people) - 1)))))
    last = figures(as_people(lambda one: (*([0.0] * (len(one.people) - 1)), 1.0)))
    middle = figures(
        as_people(
            lambda one: tuple(float(i == round(0.5 * (len(one.people) - 1))) for i in range(len(one.people)))
        )
    )
    for subset in ("all", "german"):
        reached = [of[subset, "js"].interval().value for of in (first, middle, last)]
        assert min(value for value in reached if value is not None) == pytest.approx(
            first[subset, "js"].floors["constant"]
        )


def test_invalid_replies_are_missing() -> None:
    def half(text: str, options: list[str]) -> list[float]:
        return [0.0] * len(options) if "Germa" in text else evenly(text, options)

    found = figures(half)
    assert found["german", "js"].interval().value is None
    assert (found["german", "js"].n, found["german", "js"].invalid_rate) == (0, 1)
    both = found["all", "js"]
    assert (both.n, both.draws) == (7, 11 * 12)
    assert both.units == tuple(dict.fromkeys(one.seed.id for one in ASKED))
    assert both.invalid_rate == pytest.approx(4 / 11)
    columns = both.parameters["columns"]
    assert {row[columns.index("german")] for row in both.values} == {None}
    assert sum(value is not None for row in both.values for value in row) == 7


def test_two_models_are_compared_on_the_same_questions() -> None:
    good, bad = figures(as_people(lambda one: one.people)), figures(evenly)
    found = {(c.subset, c.metric): c for c in compare("bad", list(bad.values()), "good", list(good.values()))}
    js = found["all", "js"]
    assert js.difference is not None
    assert js.p_holm is not None
    assert js.difference.value == pytest.approx(-(bad["all", "js"].floors["random"] or 0))
    assert js.difference.high < 0
    assert js.p_holm >= js.difference.p
    # Questions that one model did not answer are left out for both.
    silent = figures(evenly, logprobs=False, words="no idea")
    nothing = compare("bad", list(bad.values()), "silent", list(silent.values()))
    assert all(c.difference is None and c.n_units == 0 for c in nothing)
