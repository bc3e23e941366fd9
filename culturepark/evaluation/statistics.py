"""The arithmetic of evaluation: distances, scores, and how sure one can be of them. numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[Floats], float]
"""One number of a sample: rows are the units that are resampled."""

CONFIDENCE = 0.95
"""The confidence level of all intervals."""
RESAMPLES = 2000
"""A bootstrap draws this many resamples unless a p-value needs more."""
_MIN_TAIL = 20
"""With fewer resamples than this on the other side of zero, a p-value is too coarse and more are drawn."""
_Z = 1.959963984540054
"""Normal quantile of 97.5 %."""


class Interval(Struct, frozen=True):
    """A figure and the range that 95 % of resamples fall into; bounds are None below two units."""

    value: float | None
    low: float | None
    high: float | None


class Difference(Struct, frozen=True):
    """How far a second model is from a first on the same units: second minus first, with the
    two-sided p-value that there is no difference."""

    value: float
    low: float
    high: float
    p: float


def none_if_nan(value: float | None) -> float | None:
    """The value for a file or a table, where what is not defined (NaN) is None."""
    return None if value is None or math.isnan(value) else value


# --- uncertainty


def bootstrap(values: Floats, statistic: Statistic, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The statistic with its 95 % percentile interval, drawing rows of `values` with replacement.

    Resamples on which the statistic is not defined (NaN) are left out.
    """
    value = statistic(values) if len(values) else math.nan
    if math.isnan(value):
        return Interval(None, None, None)
    if len(values) < 2:
        return Interval(value, None, None)
    low, high = _percentile_interval(
        _resampled(len(values), seed, resamples, lambda rows: statistic(values[rows]))
    )
    return Interval(value, low, high)


def paired_bootstrap(
    first: Floats, second: Floats, statistic: Statistic, seed: int = 0, max_resamples: int = RESAMPLES
) -> Difference | None:
    """How the statistic differs between two samples over the same units, row by row.

    The same rows are drawn of both, RESAMPLES times, or `max_resamples` times where that leaves the p-value
    too coarse: see `resamples_for`. None if it is not defined on either. Raises ValueError unless there is
    one row for each unit in both.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} units cannot be paired with {len(second)}")
    if len(first) < 2:
        return None
    value = statistic(second) - statistic(first)
    if math.isnan(value):
        return None

    def resampled(resamples: int) -> Floats:
        return _resampled(
            len(first), seed, resamples, lambda rows: statistic(second[rows]) - statistic(first[rows])
        )

    return _difference(value, resampled, max_resamples)


def unpaired_bootstrap(
    first: Floats, second: Floats, statistic: Statistic, seed: int = 0, max_resamples: int = RESAMPLES
) -> Difference | None:
    """How the statistic differs between two samples over units of their own, each resampled by itself.

    `max_resamples` as for `paired_bootstrap`. None if it is not defined on either, or a sample has fewer than
    two units.
    """
    if min(len(first), len(second)) < 2:
        return None
    value = statistic(second) - statistic(first)
    if math.isnan(value):
        return None

    def resampled(resamples: int) -> Floats:
        before = _resampled(len(first), seed, resamples, lambda rows: statistic(first[rows]))
        return _resampled(len(second), seed + 1, resamples, lambda rows: statistic(second[rows])) - before

    return _difference(value, resampled, max_resamples)


def resamples_for(comparisons: int) -> int:
    """How many resamples let a p-value stay small after `holm` has multiplied it by the number of
    comparisons."""
    return max(RESAMPLES, 200 * comparisons)


def _difference(value: float, resampled: Callable[[int], Floats], max_resamples: int) -> Difference:
    differences = resampled(RESAMPLES)
    if max_resamples > RESAMPLES and _tail(differences) < _MIN_TAIL:
        differences = resampled(max_resamples)
    low, high = _percentile_interval(differences)
    # One is added to each tail, so that no finite number of resamples claims certainty.
    n = int((~np.isnan(differences)).sum())
    return Difference(value, low, high, min(1.0, 2 * float(_tail(differences) + 1) / (n + 1)))


def _tail(differences: Floats) -> int:
    """The size of the smaller tail: how many are at most zero, or how many at least."""
    return int(min((differences <= 0).sum(), (differences >= 0).sum()))


def _resampled(n: int, seed: int, resamples: int, measure: Callable[[Ints], float]) -> Floats:
    rng = np.random.default_rng(seed)
    return np.array([measure(rng.integers(0, n, n)) for _ in range(resamples)])


def _percentile_interval(values: Floats) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for multiple comparisons (Holm 1979), in the order given."""
    corrected = [1.0] * len(p_values)
    worst = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, (len(p_values) - rank) * p_values[place])
        corrected[place] = min(1.0, worst)
    return corrected


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); 0 to 1 without any trial."""
    if not n:
        return 0.0, 1.0
    share, z2 = hits / n, _Z * _Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half_width = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


# --- distributions


def entropy(p: ArrayLike) -> float:
    """Shannon entropy in bits."""
    shares = _shares(p)
    held = shares[shares > 0]
    return float(-(held * np.log2(held)).sum()) + 0.0


def jensen_shannon(p: ArrayLike, q: ArrayLike) -> float:
    """Jensen-Shannon divergence in bits: 0 for equal distributions, 1 for disjoint ones."""
    left, right = _shares(p), _shares(q)
    divergence = entropy(left + right) - (entropy(left) + entropy(right)) / 2
    return min(1.0, max(0.0, divergence))


def earth_mover(p: ArrayLike, q: ArrayLike) -> float:
    """How far shares have to be moved along an ordered scale of even steps (earth mover's distance), from 0
    to 1 (end to end)."""
    left, right = _shares(p), _shares(q)
    if len(left) < 2:
        return 0.0
    return float(np.abs(np.cumsum(left - right)[:-1]).sum() / (len(left) - 1))


def entropy_ratio(model: ArrayLike, people: ArrayLike) -> float:
    """The model's entropy over people's: under 1 its answers are too alike. NaN if all people agree."""
    theirs = entropy(people)
    return entropy(model) / theirs if theirs > 0 else math.nan


def _shares(p: ArrayLike) -> Floats:
    shares = np.asarray(p, dtype=np.float64)
    total = shares.sum()
    if shares.ndim != 1 or not total > 0 or (shares < 0).any():
        raise ValueError("a distribution is a list of shares of which none is negative and one is not 0")
    return shares / total


# --- scores


def mean(values: Floats) -> float:
    """Mean of the first column, missing values (NaN) left out."""
    column = values[:, 0]
    column = column[~np.isnan(column)]
    return float(column.mean()) if len(column) else math.nan


def mean_of_cells(values: Floats, columns: Sequence[str]) -> float:
    """Mean of all cells, missing ones (NaN) left out: rows are drawn whole, since the cells of one are
    correlated (cluster bootstrap). `columns` name what stands in them, so that only the same is compared."""
    cells = values[~np.isnan(values)]
    return float(cells.mean()) if len(cells) else math.nan


def ratio(values: Floats) -> float:
    """Sum of the first column over that of the second, rows with a missing value (NaN) left out; NaN
    where the second sum is 0."""
    complete = values[~np.isnan(values).any(axis=1)]
    numerator, denominator = complete.sum(axis=0) if len(complete) else (0.0, 0.0)
    return float(numerator / denominator) if denominator else math.nan


def total(values: Floats) -> float:
    """Sum of the first column, missing values (NaN) left out."""
    return float(np.nansum(values[:, 0]))


def class_f1(truth: ArrayLike, predicted: ArrayLike, of: int) -> float:
    """F1 of one class; NaN if it is neither there nor predicted."""
    true, positive = np.asarray(truth) == of, np.asarray(predicted) == of
    both = int(true.sum() + positive.sum())
    return 2 * int((true & positive).sum()) / both if both else math.nan


def macro_f1(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Mean F1 of the classes that are there. A prediction of no class (-1: unreadable) is wrong."""
    true = np.asarray(truth)
    if not len(true):
        return math.nan
    return float(np.mean([class_f1(true, predicted, int(one)) for one in np.unique(true)]))


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN where a side does not vary."""
    a, b = ranks(first), ranks(second)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    column = np.asarray(values, dtype=np.float64)
    _, which, counts = np.unique(column, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def cohen_kappa(tables: Floats) -> float:
    """Agreement of two judges beyond chance (Cohen 1960); NaN when chance alone would agree always.

    Each row is a confusion matrix, flattened: how often the first judge gave one label and the second
    another. The rows are added up, so that what is correlated can be drawn together (cluster bootstrap).
    """
    side = math.isqrt(tables.shape[1])
    counts = tables.sum(axis=0).reshape(side, side)
    n = counts.sum()
    if not n:
        return math.nan
    agreed = counts.trace() / n
    chance = float(counts.sum(axis=0) @ counts.sum(axis=1)) / (n * n)
    return float((agreed - chance) / (1 - chance)) if chance < 1 else math.nan


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of n-grams of words that occur for the first time (Li et al. 2016); NaN without any."""
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        grams = grams_of(text, n)
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else math.nan


def grams_of(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of words of a text, in order."""
    words = text.lower().split()
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
