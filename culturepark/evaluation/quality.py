"""Quality of a run's data, as far as it can be counted: no model is asked anything.

The unit is the dialogue: its opinions are correlated, so intervals are drawn over dialogues (cluster
bootstrap). A figure of opinions is a ratio of two sums over dialogues (ratio estimator).
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
    DialogueData,
    Opinion,
    RunData,
    Turn,
    vectors_of,
    with_estimated_usage,
)
from culturepark.evaluation.statistics import Floats, none_if_nan
from culturepark.ports import Vectors
from culturepark.pricing import cost
from culturepark.settings import RefineSettings, Settings
from culturepark.usage import Usage

BUDGET = "budget"
"""The task of figures at the budget of tokens that two runs share."""
_BLOCK_ROWS = 256
"""The number of rows whose similarities to all others are in memory at once."""

Part = tuple[float | None, float]
"""What a dialogue adds to a ratio's numerator and denominator; None is unknown."""


def measurements(
    run_data: RunData, originals: Vectors | None, *, same_embedder: bool = True
) -> list[Measurement]:
    """Every figure, of all and, if there are several, by culture. A figure that changes with the amount of
    data is compared with that of another run only on the same budget (`Measurement.compared`).

    `originals` are vectors of the statements talked about, by the run's own embedder; without them there is
    no `diversity_gain`. Without `same_embedder` vectors are not compared with those of another run.
    """
    return [
        one
        for subset, of in _subsets(with_estimated_usage(run_data)).items()
        for one in (
            *_distinct_n(TASK, subset, of, of.kept),
            *(replace(one, compared=same_embedder) for one in _diversity(TASK, subset, of, originals)),
            *_rejected_duplicates(TASK, subset, of),
            _kept_duplicates(TASK, subset, of, len(of.kept)),
            *stances.measurements(subset, of),
            *_costs(TASK, subset, of),
        )
    ]


def _subsets(run_data: RunData) -> dict[str, RunData]:
    several = run_data.cultures if len(run_data.cultures) > 1 else []
    return {ALL: run_data} | {culture: run_data.only((culture,)) for culture in several}


def ratio_of_sums(
    task: str,
    subset: str,
    metric: str,
    better: Better,
    dialogues: Sequence[DialogueData],
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
    """A figure whose parts are known by dialogue: a ratio of two sums, unless `statistic` is another one. A
    dialogue without a part adds nothing."""
    return Measurement(
        task=task,
        subset=subset,
        metric=metric,
        better=better,
        unit="dialogue",
        units=tuple(dialogue.id for dialogue in dialogues),
        values=tuple(parts.get(dialogue.id, (0.0, 0.0)) for dialogue in dialogues),
        n=n,
        draws=n if draws is None else draws,
        invalid_rate=invalid_rate,
        statistic=statistic,
        floors=dict(floors or {}),
        notes=notes,
        paired=False,
        compared=compared,
    )


def by_dialogue(opinions: Sequence[Opinion | Turn], values: Sequence[float] | Floats) -> dict[str, Part]:
    """The sum of values and the number of opinions or turns, by dialogue."""
    sums: dict[str, float] = defaultdict(float)
    for one, value in zip(opinions, values, strict=True):
        sums[one.dialogue_id] += float(value)
    counts = Counter(one.dialogue_id for one in opinions)
    return {dialogue: (none_if_nan(sums[dialogue]), float(n)) for dialogue, n in counts.items()}


# --- words


def _distinct_n(task: str, subset: str, run_data: RunData, kept: Sequence[Opinion]) -> list[Measurement]:
    """distinct-n of these (Li et al. 2016): compared on one budget, where both runs have as many words."""
    compared = task == BUDGET
    return [
        ratio_of_sums(
            task, subset, f"distinct_{n}", "higher", run_data.dialogues, parts, n=len(kept), compared=compared
        )
        for n in (1, 2, 3)
        for parts in [distinct_parts(kept, n)]
    ]


def distinct_parts(opinions: Sequence[Opinion], n: int) -> dict[str, Part]:
    """By dialogue, its part in the number of distinct n-grams, and the number of its n-grams.

    An n-gram that occurs c times counts 1/c at each place, so that the parts add up to distinct-n.
    """
    counts = Counter(gram for one in opinions for gram in stats.grams_of(one.text, n))
    found: dict[str, Part] = {}
    for one in opinions:
        grams = stats.grams_of(one.text, n)
        numerator, denominator = found.get(one.dialogue_id, (0.0, 0.0))
        distinct = sum(1 / counts[gram] for gram in grams)
        found[one.dialogue_id] = ((numerator or 0.0) + distinct, denominator + len(grams))
    return found


# --- vectors


def _diversity(task: str, subset: str, run_data: RunData, originals: Vectors | None) -> list[Measurement]:
    every = [one for one in run_data.opinions if one.vector is not None]
    found: list[Measurement] = []
    of: tuple[tuple[str, Better, list[Opinion]], ...] = (
        ("spread", "higher", [one for one in every if one.kept]),
        ("spread_before_selection", "neither", every),
    )
    for metric, better, opinions in of:
        parts = by_dialogue(opinions, spread_parts(vectors_of(opinions)))
        found.append(ratio_of_sums(task, subset, metric, better, run_data.dialogues, parts, n=len(opinions)))
    if originals is not None:
        kept = of[0][2]
        parts = by_dialogue(kept, diversity_gains(vectors_of(kept), originals))
        floors = {"constant": 0.0}
        found.append(
            ratio_of_sums(
                task,
                subset,
                "diversity_gain",
                "higher",
                run_data.dialogues,
                parts,
                n=len(kept),
                floors=floors,
            )
        )
    return found


def spread_parts(vectors: Vectors) -> Floats:
    """By row, its part in the mean cosine distance of all pairs: the mean of the parts is that distance.

    Each pair has two rows, so a part is twice the row's mean distance to the others, less the figure: then an
    interval over rows is as wide as one over pairs has to be (Hajek projection of a U-statistic). NaN for a
    single row.
    """
    n = len(vectors)
    if n < 2:
        return np.full(n, math.nan)
    rows = vectors.astype(np.float64)
    similarities = (rows @ rows.sum(axis=0) - (rows * rows).sum(axis=1)) / (n - 1)
    distances = 1 - similarities
    return 2 * distances - distances.mean()


def diversity_gains(vectors: Vectors, originals: Vectors) -> Floats:
    """By row, the smallest cosine distance to an original (after CulturePark, arXiv 2405.15145)."""
    if not len(vectors):
        return np.zeros(0)
    return 1 - (vectors @ originals.T).max(axis=1).astype(np.float64)


def _rejected_duplicates(task: str, subset: str, run_data: RunData) -> list[Measurement]:
    """The shares of opinions that selection rejected as duplicates. They grow with the amount of data, so
    runs are not compared."""
    selected = [one for one in run_data.opinions if one.vector is not None]
    reasons: tuple[tuple[str, str, Better], ...] = (
        ("near_duplicates", "near_duplicate", "lower"),
        ("clustered", "cluster", "neither"),
    )
    return [
        ratio_of_sums(
            task, subset, metric, better, run_data.dialogues, parts, n=len(selected), compared=False
        )
        for metric, reason, better in reasons
        for parts in [by_dialogue(selected, [float(one.rejected == reason) for one in selected])]
    ]


def _kept_duplicates(task: str, subset: str, run_data: RunData, samples: int) -> Measurement:
    """The share of near-duplicates among the first `samples` kept: compared on one budget, where both runs
    have as many."""
    kept = [one for one in run_data.kept if one.vector is not None][:samples]
    threshold = duplicate_threshold(run_data.run.settings.refine)
    duplicates = [float(one >= threshold) for one in nearest_similarities(vectors_of(kept))]
    parts, compared = by_dialogue(kept, duplicates), task == BUDGET
    return ratio_of_sums(
        task,
        subset,
        "near_duplicates_kept",
        "lower",
        run_data.dialogues,
        parts,
        n=len(kept),
        compared=compared,
    )


def duplicate_threshold(refine: RefineSettings) -> float:
    """The cosine similarity from which two opinions are near-duplicates; the default one where the run has
    that filter off."""
    return refine.near_duplicate if refine.near_duplicate <= 1 else RefineSettings().near_duplicate


def nearest_similarities(vectors: Vectors) -> Floats:
    """By row, the highest cosine similarity to another row; -1 for a single one."""
    found = np.full(len(vectors), -1.0)
    if len(vectors) < 2:
        return found
    for start in range(0, len(vectors), _BLOCK_ROWS):
        similarities = vectors[start : start + _BLOCK_ROWS] @ vectors.T
        own = np.arange(len(similarities))
        similarities[own, start + own] = -1.0
        found[start : start + _BLOCK_ROWS] = similarities.max(axis=1)
    return found


# --- cost


def _costs(task: str, subset: str, run_data: RunData) -> list[Measurement]:
    """Tokens, calls and money for each kept sample, of all cultures also by role. Unmetered roles are in no
    sum, so a sum without them is compared only with one of the same roles: on one budget."""
    kept = Counter(one.dialogue_id for one in run_data.kept)
    roles, unmetered = list(run_data.usage), run_data.unmetered or frozenset()
    metered = frozenset(roles) - unmetered

    def cost(
        metric: str, of: Callable[[DialogueData], float | None], notes: Sequence[str] = ()
    ) -> Measurement:
        parts: dict[str, Part] = {
            dialogue.id: (of(dialogue), float(kept[dialogue.id])) for dialogue in run_data.dialogues
        }
        shown = tuple(notes) if subset == ALL else ()
        return ratio_of_sums(
            task, subset, metric, "lower", run_data.dialogues, parts, n=kept.total(), notes=shown
        )

    tokens = cost(
        "tokens_per_sample",
        lambda dialogue: float(dialogue.tokens(metered)) if metered else None,
        _usage_notes(run_data),
    )
    calls = cost(
        "calls_per_sample", lambda dialogue: float(sum(usage.calls for usage in dialogue.usage.values()))
    )
    found = [replace(tokens, compared=task == BUDGET or not unmetered), calls]
    if subset != ALL:
        return found
    for role in roles:
        known = (role,) if role in metered else ()
        found.append(
            cost(
                f"{role}_tokens",
                lambda dialogue, known=known: float(dialogue.tokens(known)) if known else None,
            )
        )
    priced = _priced_roles(run_data)
    money = cost("money_per_sample", lambda dialogue: _money(dialogue, run_data, priced.roles), priced.notes)
    return [*found, replace(money, compared=priced.complete)]


def _usage_notes(run_data: RunData) -> list[str]:
    """Notes on the calls whose usage was not reported."""
    usage, unmetered = run_data.usage, run_data.unmetered or frozenset()
    name = run_data.run.root.resolve().name
    notes = [
        f"{name}: {of.calls} of {usage[role].calls} calls of the {role} reported no tokens; each counts as "
        "the average of its other calls."
        for role, of in run_data.estimated.items()
    ]
    if unmetered:
        notes.append(
            f"{name}: tokens_per_sample lacks those of the {', '.join(sorted(unmetered))}: most calls "
            "reported none, here or in the run beside it."
        )
    return notes


class _PricedRoles(Struct, frozen=True):
    """The roles whose cost is summed; None if a sum would say nothing. `complete`: no cost is missing."""

    roles: frozenset[str] | None
    complete: bool
    notes: tuple[str, ...] = ()


def _priced_roles(run_data: RunData) -> _PricedRoles:
    """Unmetered roles are missing unless they cost nothing; without a price, or if no role with a cost is
    left, there is no sum."""
    name, settings = run_data.run.root.resolve().name, run_data.run.settings
    usage, unmetered = run_data.usage, run_data.unmetered or frozenset()
    unpriced = [role for role, of in usage.items() if _money_of(role, of, settings) is None]
    paid = {role for role in usage if not settings.prices_of(role).local}
    missing = sorted(paid & unmetered)
    if unpriced or (missing and paid == set(missing)):
        unknown = ", ".join(unpriced or missing)
        what = f"{name}: money_per_sample is unknown: prices or tokens of the {unknown} are not known."
        return _PricedRoles(None, False, (what,))
    notes: list[str] = []
    if missing:
        notes.append(
            f"{name}: money_per_sample is at least this: tokens of the {', '.join(missing)} are not known."
        )
    if (estimated := sorted(paid & run_data.estimated.keys())) and (samples := len(run_data.kept)):
        reported = sum(
            _money_of(role, of, settings) or 0.0 for role, of in usage.items() if role not in unmetered
        )
        notes.append(
            f"{name}: money_per_sample is at least {reported / samples:.4g} by reported usage; calls of the "
            f"{', '.join(estimated)} that reported none are estimated."
        )
    return _PricedRoles(frozenset(usage.keys() - missing), not missing, tuple(notes))


def _money(dialogue: DialogueData, run_data: RunData, roles: frozenset[str] | None) -> float | None:
    if roles is None:
        return None
    of = (
        (role, usage) for by_role in (dialogue.usage, dialogue.estimated) for role, usage in by_role.items()
    )
    return sum(_money_of(role, usage, run_data.run.settings) or 0.0 for role, usage in of if role in roles)


def _money_of(role: str, usage: Usage, settings: Settings) -> float | None:
    """The cost of the reported tokens; None without prices."""
    return cost(replace(usage, unreported=0), settings.prices_of(role))


# --- two runs on the same budget


def shared_budget(first: RunData, second: RunData) -> tuple[RunData, RunData, int]:
    """Two runs cut to as many tokens as the smaller one used, and that number.

    Roles that are unmetered in either run count for neither. Raises ConfigError if no role is left.
    """
    first, second = with_estimated_usage(first), with_estimated_usage(second)
    unmetered = (first.unmetered or frozenset()) | (second.unmetered or frozenset())
    first, second = replace(first, unmetered=unmetered), replace(second, unmetered=unmetered)
    roles = frozenset(role for run_data in (first, second) for role in run_data.usage) - unmetered
    budget = min(
        sum(dialogue.tokens(roles) for dialogue in run_data.dialogues) for run_data in (first, second)
    )
    if not budget:
        what = "one of the runs has no reported tokens, so there is no budget that both share."
        raise ConfigError("--baseline", what, "Compare two runs whose endpoints report usage.")
    return first.up_to(budget, roles), second.up_to(budget, roles), budget


def budget_measurements(
    run_data: RunData, words: int, samples: int, originals: Vectors | None, *, vectors: bool = True
) -> list[Measurement]:
    """Figures of a run that was cut to a budget. distinct-n is over its first `words` words and
    near-duplicates are counted among its first `samples` kept, the same numbers for both runs, since larger
    texts repeat more. `vectors` is false where the embedders differ: then no figure of vectors is given."""
    kept = run_data.kept
    counts = Counter(one.dialogue_id for one in kept)
    each: dict[str, Part] = {dialogue: (float(n), 1.0) for dialogue, n in counts.items()}
    found = [
        ratio_of_sums(
            BUDGET, ALL, "samples", "higher", run_data.dialogues, each, n=len(kept), statistic="total"
        ),
        *_distinct_n(BUDGET, ALL, run_data, first_words(kept, words)),
        *(one for one in _costs(BUDGET, ALL, run_data) if one.metric == "tokens_per_sample"),
    ]  # fmt: skip
    if vectors:
        found += _diversity(BUDGET, ALL, run_data, originals) + _rejected_duplicates(BUDGET, ALL, run_data)
        found.append(_kept_duplicates(BUDGET, ALL, run_data, samples))
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
