"""Quality of what a run has made, as far as it can be counted: no model is asked anything.

The unit is the dialogue: its opinions hang together, so intervals are drawn over dialogues. A figure of
opinions is the sum over dialogues of what they add, over the sum of what it is a share of.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from culturepark.errors import ConfigError
from culturepark.evaluation import stances
from culturepark.evaluation import statistics as stats
from culturepark.evaluation.measure import Better, Measurement
from culturepark.evaluation.run_data import (
    ALL,
    TASK,
    Opinion,
    RunData,
    Talk,
    Turn,
    vectors_of,
    with_estimates,
)
from culturepark.evaluation.statistics import Floats
from culturepark.ports import Vectors
from culturepark.settings import RefineSettings, Settings
from culturepark.store.funnel import money_of
from culturepark.usage import Usage

BUDGET = "budget"
"""The task of figures at the budget of tokens that two runs share."""
_BLOCK = 256
"""Rows whose similarities to all are held at once."""

Part = tuple[float | None, float]
"""What a dialogue adds above and below the line; None is unknown."""


def measurements(
    made: RunData, originals: Vectors | None, *, same_embedder: bool = True
) -> list[Measurement]:
    """Every figure, of all and, if there are several, by culture. What changes with how much was made is
    compared with no other run (`Measurement.compared`), but on one budget.

    `originals` are vectors of the statements talked about, by the run's own embedder; without them there is
    no `diversity_gain`. Without `same_embedder` vectors are compared with no other run's.
    """
    return [
        one
        for subset, of in _subsets(with_estimates(made)).items()
        for one in (
            *_words(TASK, subset, of, of.kept),
            *(replace(one, compared=same_embedder) for one in _vectors(TASK, subset, of, originals)),
            *_duplicates(TASK, subset, of),
            _kept_alike(TASK, subset, of, len(of.kept)),
            *stances.measurements(subset, of),
            *_costs(TASK, subset, of),
        )
    ]


def _subsets(made: RunData) -> dict[str, RunData]:
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
    compared: bool = True,
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
        compared=compared,
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


def _words(task: str, subset: str, made: RunData, kept: Sequence[Opinion]) -> list[Measurement]:
    """distinct-n of these: compared on one budget, where two runs have as many words of each."""
    compared = task == BUDGET
    return [
        summed(task, subset, f"distinct_{n}", "higher", made.talks, parts, n=len(kept), compared=compared)
        for n in (1, 2, 3)
        for parts in [distinct_parts(kept, n)]
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


def _vectors(task: str, subset: str, made: RunData, originals: Vectors | None) -> list[Measurement]:
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


def _duplicates(task: str, subset: str, made: RunData) -> list[Measurement]:
    """What selection threw out, of what came to it. The more there is, the more of it is alike, so runs
    are not compared."""
    selected = [one for one in made.opinions if one.vector is not None]
    reasons: tuple[tuple[str, str, Better], ...] = (
        ("near_duplicates", "near_duplicate", "lower"),
        ("clustered", "cluster", "neither"),
    )
    return [
        summed(task, subset, metric, better, made.talks, parts, n=len(selected), compared=False)
        for metric, reason, better in reasons
        for parts in [by_talk(selected, [float(one.rejected == reason) for one in selected])]
    ]


def _kept_alike(task: str, subset: str, made: RunData, samples: int) -> Measurement:
    """What of the first `samples` kept is still alike: compared on one budget, where they are as many."""
    kept = [one for one in made.kept if one.vector is not None][:samples]
    threshold = threshold_of(made.run.settings.refine)
    alike = [float(one >= threshold) for one in nearest(vectors_of(kept))]
    parts, compared = by_talk(kept, alike), task == BUDGET
    return summed(
        task, subset, "near_duplicates_kept", "lower", made.talks, parts, n=len(kept), compared=compared
    )


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


def _costs(task: str, subset: str, made: RunData) -> list[Measurement]:
    """Tokens, calls and money for each kept sample, of all cultures also by role. Silent roles are in no
    sum, so that it is compared with none but one of the same roles: on one budget."""
    kept = Counter(one.talk for one in made.kept)
    roles, silent = list(made.usage), made.silent or frozenset()
    told = frozenset(roles) - silent

    def cost(metric: str, of: Callable[[Talk], float | None], notes: Sequence[str] = ()) -> Measurement:
        parts: dict[str, Part] = {talk.id: (of(talk), float(kept[talk.id])) for talk in made.talks}
        said = tuple(notes) if subset == ALL else ()
        return summed(task, subset, metric, "lower", made.talks, parts, n=kept.total(), notes=said)

    tokens = cost("tokens_per_sample", lambda talk: float(talk.tokens(told)) if told else None, _untold(made))
    calls = cost("calls_per_sample", lambda talk: float(sum(usage.calls for usage in talk.usage.values())))
    found = [replace(tokens, compared=task == BUDGET or not silent), calls]
    if subset != ALL:
        return found
    for role in roles:
        known = (role,) if role in told else ()
        found.append(
            cost(
                f"{role}_tokens",
                lambda talk, known=known: float(talk.tokens(known)) if known else None,
            )
        )
    bill = _bill(made)
    money = cost("money_per_sample", lambda talk: _money(talk, made, bill.roles), bill.notes)
    return [*found, replace(money, compared=bill.whole)]


def _untold(made: RunData) -> list[str]:
    """Notes on the calls that told no tokens."""
    usage, silent = made.usage, made.silent or frozenset()
    name = made.run.root.resolve().name
    notes = [
        f"{name}: {of.calls} of {usage[role].calls} calls of the {role} told no tokens; each counts as the "
        "average of its other calls."
        for role, of in made.untold.items()
    ]
    if silent:
        notes.append(
            f"{name}: tokens_per_sample lacks those of the {', '.join(sorted(silent))}: most calls told "
            "none, here or in the run beside it."
        )
    return notes


class _Bill(Struct, frozen=True):
    """Whose money is summed; None if that would say nothing. `whole`: nobody's is missing."""

    roles: frozenset[str] | None
    whole: bool
    notes: tuple[str, ...] = ()


def _bill(made: RunData) -> _Bill:
    """Silent roles are missing where they cost anything; without a price, or if nobody who costs is left,
    there is no sum."""
    name, settings = made.run.root.resolve().name, made.run.settings
    usage, silent = made.usage, made.silent or frozenset()
    unpriced = [role for role, of in usage.items() if _money_of(role, of, settings) is None]
    # Of calls that tell nothing, only those that cost nothing are known.
    paid = {role for role in usage if money_of(role, Usage(calls=1, unreported=1), settings) is None}
    missing = sorted(paid & silent)
    if unpriced or (missing and paid == set(missing)):
        unknown = ", ".join(unpriced or missing)
        what = f"{name}: money_per_sample is unknown: prices or tokens of the {unknown} are not known."
        return _Bill(None, False, (what,))
    notes: list[str] = []
    if missing:
        notes.append(
            f"{name}: money_per_sample is at least this: tokens of the {', '.join(missing)} are not known."
        )
    if (estimated := sorted(paid & made.untold.keys())) and (samples := len(made.kept)):
        told = sum(_money_of(role, of, settings) or 0.0 for role, of in usage.items() if role not in silent)
        notes.append(
            f"{name}: money_per_sample is at least {told / samples:.4g} by what was told; calls of the "
            f"{', '.join(estimated)} that told nothing are estimated."
        )
    return _Bill(frozenset(usage.keys() - missing), not missing, tuple(notes))


def _money(talk: Talk, made: RunData, roles: frozenset[str] | None) -> float | None:
    if roles is None:
        return None
    of = ((role, usage) for by_role in (talk.usage, talk.untold) for role, usage in by_role.items())
    return sum(_money_of(role, usage, made.run.settings) or 0.0 for role, usage in of if role in roles)


def _money_of(role: str, usage: Usage, settings: Settings) -> float | None:
    """What the told tokens cost; None without prices."""
    return money_of(role, replace(usage, unreported=0), settings)


# --- two runs on the same budget


def shared_budget(first: RunData, second: RunData) -> tuple[RunData, RunData, int]:
    """Two runs cut to as many tokens as the smaller one took, and that number.

    Roles that are silent in either run count for neither. Raises ConfigError if no role is left.
    """
    first, second = with_estimates(first), with_estimates(second)
    silent = (first.silent or frozenset()) | (second.silent or frozenset())
    first, second = replace(first, silent=silent), replace(second, silent=silent)
    roles = frozenset(role for made in (first, second) for role in made.usage) - silent
    budget = min(sum(talk.tokens(roles) for talk in made.talks) for made in (first, second))
    if not budget:
        what = "one of the runs tells of no tokens, so there is no budget that both share."
        raise ConfigError("--baseline", what, "Take two runs whose endpoints report usage.")
    return first.up_to(budget, roles), second.up_to(budget, roles), budget


def budget_measurements(
    made: RunData, words: int, samples: int, originals: Vectors | None, *, vectors: bool = True
) -> list[Measurement]:
    """Figures of a run that was cut to a budget. distinct-n is over its first `words` words, and what is
    alike among its first `samples` kept, the same numbers for both: more words repeat more. Without
    `vectors`, nothing that another embedder would see otherwise."""
    kept = made.kept
    counts = Counter(one.talk for one in kept)
    each: dict[str, Part] = {talk: (float(n), 1.0) for talk, n in counts.items()}
    found = [
        summed(
            BUDGET, ALL, "samples", "higher", made.talks, each, n=len(kept), statistic="total"
        ),
        *_words(BUDGET, ALL, made, first_words(kept, words)),
        *(one for one in _costs(BUDGET, ALL, made) if one.metric == "tokens_per_sample"),
    ]  # fmt: skip
    if vectors:
        found += _vectors(BUDGET, ALL, made, originals) + _duplicates(BUDGET, ALL, made)
        found.append(_kept_alike(BUDGET, ALL, made, samples))
    return found


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
