"""Quality of what a run has made, as far as it can be counted: no model is asked anything.

The unit is the dialogue: its opinions hang together, so intervals are drawn over dialogues. A figure of
opinions is the sum over dialogues of what they add, over the sum of what it is a share of.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from msgspec.structs import replace

from culturepark.errors import ConfigError
from culturepark.evaluation import stances
from culturepark.evaluation import statistics as stats
from culturepark.evaluation.made import ALL, TASK, Made, Opinion, Talk, Turn, vectors_of
from culturepark.evaluation.measure import Better, Measurement
from culturepark.evaluation.statistics import Floats
from culturepark.ports import Vectors
from culturepark.settings import RefineSettings, Settings
from culturepark.store.funnel import money_of

BUDGET = "budget"
"""The task of figures at the budget of tokens that two runs share."""
_BLOCK = 256
"""Rows whose similarities to all are held at once."""

Part = tuple[float | None, float]
"""What a dialogue adds above and below the line; None is unknown."""


def measurements(made: Made, originals: Vectors | None) -> list[Measurement]:
    """Every figure, of all and, if there are several, by culture.

    `originals` are vectors of the statements talked about, by the run's own embedder; without them there is
    no `diversity_gain`.
    """
    return [
        one
        for subset, of in _subsets(made).items()
        for one in (
            *_words(TASK, subset, of, of.kept),
            *_vectors(TASK, subset, of, originals),
            *_duplicates(TASK, subset, of),
            *stances.measurements(subset, of),
            *_costs(subset, of),
        )
    ]


def _subsets(made: Made) -> dict[str, Made]:
    several = made.cultures if len(made.cultures) > 1 else []
    return {ALL: made} | {culture: made.only((culture,)) for culture in several}


def summed(
    task: str,
    subset: str,
    metric: str,
    better: Better,
    talks: Sequence[Talk],
    parts: Mapping[str, Part],
    *,
    n: int,
    draws: int | None = None,
    invalid_rate: float = 0.0,
    statistic: str = "ratio",
    floors: Mapping[str, float | None] | None = None,
    notes: tuple[str, ...] = (),
) -> Measurement:
    """A figure whose parts are known by dialogue; a dialogue without one adds nothing."""
    return Measurement(
        task=task,
        subset=subset,
        metric=metric,
        better=better,
        unit="dialogue",
        units=tuple(talk.id for talk in talks),
        values=tuple(parts.get(talk.id, (0.0, 0.0)) for talk in talks),
        n=n,
        draws=n if draws is None else draws,
        invalid_rate=invalid_rate,
        statistic=statistic,
        floors=dict(floors or {}),
        notes=notes,
        paired=False,
    )


def by_talk(opinions: Sequence[Opinion | Turn], values: Sequence[float] | Floats) -> dict[str, Part]:
    """The sum of values and the number of opinions or turns, by dialogue."""
    above: dict[str, float] = defaultdict(float)
    for one, value in zip(opinions, values, strict=True):
        above[one.talk] += float(value)
    below = Counter(one.talk for one in opinions)
    return {talk: (_known(above[talk]), float(n)) for talk, n in below.items()}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


# --- words


def _words(task: str, subset: str, made: Made, kept: Sequence[Opinion]) -> list[Measurement]:
    return [
        summed(task, subset, f"distinct_{n}", "higher", made.talks, distinct_parts(kept, n), n=len(kept))
        for n in (1, 2, 3)
    ]


def distinct_parts(opinions: Sequence[Opinion], n: int) -> dict[str, Part]:
    """By dialogue, its part in the number of distinct n-grams, and its n-grams.

    An n-gram that occurs c times counts 1/c at each place, so that the parts add up to distinct-n.
    """
    counts = Counter(gram for one in opinions for gram in stats.grams_of(one.text, n))
    found: dict[str, Part] = {}
    for one in opinions:
        grams = stats.grams_of(one.text, n)
        above, below = found.get(one.talk, (0.0, 0.0))
        found[one.talk] = ((above or 0.0) + sum(1 / counts[gram] for gram in grams), below + len(grams))
    return found


# --- vectors


def _vectors(task: str, subset: str, made: Made, originals: Vectors | None) -> list[Measurement]:
    every = [one for one in made.opinions if one.vector is not None]
    found: list[Measurement] = []
    of: tuple[tuple[str, Better, list[Opinion]], ...] = (
        ("spread", "higher", [one for one in every if one.kept]),
        ("spread_before_selection", "neither", every),
    )
    for metric, better, opinions in of:
        parts = by_talk(opinions, spread_parts(vectors_of(opinions)))
        found.append(summed(task, subset, metric, better, made.talks, parts, n=len(opinions)))
    if originals is not None:
        kept = of[0][2]
        parts = by_talk(kept, gains(vectors_of(kept), originals))
        floors = {"constant": 0.0}
        found.append(
            summed(task, subset, "diversity_gain", "higher", made.talks, parts, n=len(kept), floors=floors)
        )
    return found


def spread_parts(vectors: Vectors) -> Floats:
    """By row, its part in the mean cosine distance of all pairs: the mean of the parts is that distance.

    A row is in a pair by either end, so its part is twice its mean distance to the others, less the
    figure: then an interval over rows is as wide as one over pairs has to be. NaN for a single row.
    """
    n = len(vectors)
    if n < 2:
        return np.full(n, math.nan)
    rows = vectors.astype(np.float64)
    similar = (rows @ rows.sum(axis=0) - (rows * rows).sum(axis=1)) / (n - 1)
    distances = 1 - similar
    return 2 * distances - distances.mean()


def gains(vectors: Vectors, originals: Vectors) -> Floats:
    """By row, the smallest cosine distance to an original (after CulturePark, arXiv 2405.15145)."""
    if not len(vectors):
        return np.zeros(0)
    return 1 - (vectors @ originals.T).max(axis=1).astype(np.float64)


def _duplicates(task: str, subset: str, made: Made) -> list[Measurement]:
    """What selection threw out, of what came to it; and what of the kept is still alike."""
    selected = [one for one in made.opinions if one.vector is not None]
    kept = [one for one in selected if one.kept]
    threshold = threshold_of(made.run.settings.refine)
    alike = [float(one >= threshold) for one in nearest(vectors_of(kept))]
    reasons: tuple[tuple[str, str, Better], ...] = (
        ("near_duplicates", "near_duplicate", "lower"),
        ("clustered", "cluster", "neither"),
    )
    return [
        *(
            summed(task, subset, metric, better, made.talks, parts, n=len(selected))
            for metric, reason, better in reasons
            for parts in [by_talk(selected, [float(one.rejected == reason) for one in selected])]
        ),
        summed(task, subset, "near_duplicates_kept", "lower", made.talks, by_talk(kept, alike), n=len(kept)),
    ]


def threshold_of(refine: RefineSettings) -> float:
    """The similarity from which two opinions are the same; where that is turned off, the default one."""
    return refine.near_duplicate if refine.near_duplicate <= 1 else RefineSettings().near_duplicate


def nearest(vectors: Vectors) -> Floats:
    """By row, the highest cosine similarity to another row; -1 for a single one."""
    found = np.full(len(vectors), -1.0)
    if len(vectors) < 2:
        return found
    for at in range(0, len(vectors), _BLOCK):
        similar = vectors[at : at + _BLOCK] @ vectors.T
        own = np.arange(len(similar))
        similar[own, at + own] = -1.0
        found[at : at + _BLOCK] = similar.max(axis=1)
    return found


# --- cost


def _costs(subset: str, made: Made) -> list[Measurement]:
    """Tokens, calls and money for each kept sample, of all cultures also by role. Who told no tokens is in
    no sum: see the notes."""
    kept = Counter(one.talk for one in made.kept)
    silent, settings = made.silent_roles, made.run.settings
    roles = sorted({role for talk in made.talks for role in talk.usage})
    told = frozenset(roles) - silent

    def cost(metric: str, of: Callable[[Talk], float | None], note: str = "") -> Measurement:
        parts: dict[str, Part] = {talk.id: (of(talk), float(kept[talk.id])) for talk in made.talks}
        notes = (note,) if note else ()
        return summed(TASK, subset, metric, "lower", made.talks, parts, n=kept.total(), notes=notes)

    missing = f"tokens_per_sample lacks what nobody told: that of the {', '.join(sorted(silent))}."
    found = [
        cost(
            "tokens_per_sample",
            lambda talk: float(talk.tokens(told)) if told else None,
            missing if silent else "",
        ),
        cost("calls_per_sample", lambda talk: float(sum(usage.calls for usage in talk.usage.values()))),
    ]
    if subset != ALL:
        return found
    for role in roles:
        silently = role in silent
        found.append(
            cost(
                f"{role}_tokens",
                lambda talk, role=role, silently=silently: None if silently else float(talk.tokens((role,))),
            )
        )
    unpriced = sorted({role for talk in made.talks for role in _unpriced(talk, settings)})
    unknown = f"money_per_sample is unknown: prices or tokens of the {', '.join(unpriced)} are not known."
    found.append(
        cost(
            "money_per_sample",
            lambda talk: None if unpriced else _money(talk, settings),
            unknown if unpriced else "",
        )
    )
    return found


def _money(talk: Talk, settings: Settings) -> float:
    return sum(money_of(role, usage, settings) or 0.0 for role, usage in talk.usage.items())


def _unpriced(talk: Talk, settings: Settings) -> list[str]:
    return [role for role, usage in talk.usage.items() if money_of(role, usage, settings) is None]


# --- two runs on the same budget


def shared_budget(first: Made, second: Made) -> tuple[Made, Made, int]:
    """Two runs cut to as many tokens as the smaller one took, and that number.

    Roles some of whose calls told no tokens in either run count for neither. Raises ConfigError if no
    role is left.
    """
    roles = frozenset(role for made in (first, second) for talk in made.talks for role in talk.usage)
    roles -= first.silent_roles | second.silent_roles
    budget = min(sum(talk.tokens(roles) for talk in made.talks) for made in (first, second))
    if not budget:
        what = "one of the runs tells of no tokens, so there is no budget that both share."
        raise ConfigError("--baseline", what, "Take two runs whose endpoints report usage.")
    return first.up_to(budget, roles), second.up_to(budget, roles), budget


def budget_measurements(
    made: Made, words: int, originals: Vectors | None, *, vectors: bool = True
) -> list[Measurement]:
    """Figures of a run that was cut to a budget. distinct-n is over its first `words` words, the same
    number for both: more words repeat more. Without `vectors`, nothing that another embedder would see
    otherwise."""
    kept = made.kept
    counts = Counter(one.talk for one in kept)
    samples: dict[str, Part] = {talk: (float(n), 1.0) for talk, n in counts.items()}
    found = [
        summed(
            BUDGET, ALL, "samples", "higher", made.talks, samples, n=len(kept), statistic="total"
        ),
        *_words(BUDGET, ALL, made, first_words(kept, words)),
        *(one for one in _costs(ALL, made) if one.metric == "tokens_per_sample"),
    ]  # fmt: skip
    if vectors:
        found += _vectors(BUDGET, ALL, made, originals) + _duplicates(BUDGET, ALL, made)
    return [replace(one, task=BUDGET) for one in found]


def first_words(opinions: Sequence[Opinion], words: int) -> list[Opinion]:
    """The first of these that together have no more words than that."""
    chosen: list[Opinion] = []
    for one in opinions:
        words -= words_in((one,))
        if words < 0:
            break
        chosen.append(one)
    return chosen


def words_in(opinions: Iterable[Opinion]) -> int:
    """How many words these have together, as distinct-n counts them."""
    return sum(len(stats.grams_of(one.text, 1)) for one in opinions)
