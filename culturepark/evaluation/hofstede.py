"""The arithmetic of the Values Survey Module 2013: six indices of a group's answers, and their errors against
Hofstede's published figures for countries.

Answers are an array of shape (people, cultures * 24): person by person the codes 1 to 5 of items 1 to
24 of each culture in turn, NaN where missing. One code scale holds for all items as the module numbers
them. Formulas: Hofstede and Minkov, VSM 2013, release of May 2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from culturepark.evaluation import statistics as stats
from culturepark.evaluation.data_files import data_rows
from culturepark.evaluation.statistics import Floats

N_ITEMS = 24
CODES = (1, 2, 3, 4, 5)
DIMENSIONS = ("pdi", "idv", "mas", "uai", "lto", "ivr")
FORMULAS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "pdi": ((35, 7, 2), (25, 20, 23)),
    "idv": ((35, 4, 1), (35, 9, 6)),
    "mas": ((35, 5, 3), (35, 8, 10)),
    "uai": ((40, 18, 15), (25, 21, 24)),
    "lto": ((40, 13, 14), (25, 19, 22)),
    "ivr": ((35, 12, 11), (40, 17, 16)),
}
"""By dimension, two terms of (weight, item whose mean is added, item whose mean is subtracted)."""
PAPER_CONSTANT = 50.0
"""What the published code of CulturePark (arXiv 2405.15145) adds to every index."""

Published = Sequence[Sequence[float | None]]
"""By culture, its six published figures; None where there is none."""


@cache
def published_table() -> dict[str, tuple[float | None, ...]]:
    """Six figures by row name; None where the table has none (see data/SOURCES.md)."""
    return {
        row["country"]: tuple(float(row[one]) if row[one] else None for one in DIMENSIONS)
        for row in data_rows("hofstede_6d.csv")
    }


@cache
def regions() -> frozenset[str]:
    """Names of rows that stand for several countries."""
    return frozenset(row["country"] for row in data_rows("hofstede_6d.csv") if row["kind"] == "region")


def raw_indices(values: Floats) -> Floats:
    """Indices without their constants, shape (cultures, 6). NaN where an item has no answer at all."""
    answers = values.reshape(len(values), -1, N_ITEMS)
    valid = ~np.isnan(answers)
    counts = valid.sum(axis=0)
    sums = np.where(valid, answers, 0.0).sum(axis=0)
    means = np.where(counts, sums / np.maximum(counts, 1), np.nan)
    return means @ _WEIGHTS.T if not np.isnan(means).any() else _with_gaps(means)


def _with_gaps(means: Floats) -> Floats:
    """As a product, but an item without answers makes only the indices that it is part of NaN."""
    sums = np.where(_WEIGHTS != 0, _WEIGHTS * np.nan_to_num(means)[:, None, :], 0.0).sum(axis=2)
    undefined = ((_WEIGHTS != 0) & np.isnan(means)[:, None, :]).any(axis=2)
    return np.where(undefined, np.nan, sums)


def leave_one_out_constants(raw: Floats, published: Floats) -> Floats:
    """For each culture and dimension the constant that fits all *other* cultures best, shape as `raw`.

    NaN where no other culture has both figures.
    """
    gaps = published - raw
    present = ~np.isnan(gaps)
    total = np.where(present, gaps, 0.0)
    others = total.sum(axis=0) - total
    n_others = present.sum(axis=0) - present
    return np.where(n_others > 0, others / np.maximum(n_others, 1), np.nan)


def errors(values: Floats, published: Published) -> Floats:
    """Index minus published figure, constants fitted leave-one-culture-out; NaN where one is missing."""
    raw, figures = raw_indices(values), _array(published)
    return raw + leave_one_out_constants(raw, figures) - figures


def rmse_of(values: Floats, published: Published, culture: int | None = None) -> float:
    """Root mean square error over the dimensions present, of one culture or of all."""
    found = errors(values, published)
    found = found if culture is None else found[culture]
    present = found[~np.isnan(found)]
    return float(np.sqrt(np.mean(present**2))) if present.size else float("nan")


def euclid_of(values: Floats, published: Published) -> float:
    """Mean over cultures of the paper's Euclidean distance: constants of 50, dimensions present summed."""
    gaps = raw_indices(values) + PAPER_CONSTANT - _array(published)
    present = ~np.isnan(gaps)
    if not present.any():
        return float("nan")
    distances = np.sqrt(np.where(present, gaps**2, 0.0).sum(axis=1))
    return float(distances[present.any(axis=1)].mean())


def spearman_of(values: Floats, published: Published) -> float:
    """Rank correlation across cultures, mean of the dimensions on which cultures differ at all.

    It needs no constants. NaN below three cultures.
    """
    raw, figures = raw_indices(values), _array(published)
    found: list[float] = []
    for mine, theirs in zip(raw.T, figures.T, strict=True):
        present = ~(np.isnan(mine) | np.isnan(theirs))
        if present.sum() >= 3 and not np.isnan(one := stats.spearman(mine[present], theirs[present])):
            found.append(one)
    return float(np.mean(found)) if found else float("nan")


def index_of(values: Floats, culture: int, dimension: int) -> float:
    """One raw index of one culture."""
    return float(raw_indices(values)[culture, dimension])


def _array(published: Published) -> Floats:
    return np.array(published, dtype=np.float64)


def _weights() -> NDArray[np.float64]:
    weights = np.zeros((len(DIMENSIONS), N_ITEMS))
    for row, dimension in zip(weights, DIMENSIONS, strict=True):
        for weight, plus, minus in FORMULAS[dimension]:
            row[plus - 1] += weight
            row[minus - 1] -= weight
    return weights


_WEIGHTS = _weights()
