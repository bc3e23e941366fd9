"""The arithmetic of the Values Survey Module 2013: six indices of a group's answers, and how far they
are from Hofstede's published figures for countries.

Answers are an array of shape (people, cultures * 24): person by person the codes 1 to 5 of items 1 to
24 of each culture in turn, NaN where missing. One code scale holds for all items as the module numbers
them. Formulas: Hofstede and Minkov, VSM 2013, release of May 2013.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from culturepark.evaluation import statistics as stats
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
"""Weight, item whose mean counts for, item whose mean counts against."""
PAPER_CONSTANT = 50.0
"""What the published code of CulturePark (arXiv 2405.15145) adds to every index."""

Published = Sequence[Sequence[float | None]]
"""By culture, its six published figures; None where there is none."""


@cache
def published_table() -> dict[str, tuple[float | None, ...]]:
    """Six figures by row name; None where the table has none (see data/SOURCES.md)."""
    return {
        row["country"]: tuple(float(row[one]) if row[one] else None for one in DIMENSIONS)
        for row in _table_rows()
    }


@cache
def regions() -> frozenset[str]:
    """Names of rows that stand for several countries."""
    return frozenset(row["country"] for row in _table_rows() if row["kind"] == "region")


def _table_rows() -> list[dict[str, str]]:
    text = resources.files("culturepark.evaluation").joinpath("data/hofstede_6d.csv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))


def raw_indices(values: Floats) -> Floats:
    """Indices without their constants, shape (cultures, 6). NaN where an item has no answer at all."""
    answers = values.reshape(len(values), -1, N_ITEMS)
    valid = ~np.isnan(answers)
    counts = valid.sum(axis=0)
    sums = np.where(valid, answers, 0.0).sum(axis=0)
    means = np.where(counts, sums / np.maximum(counts, 1), np.nan)
    return means @ _WEIGHTS.T if not np.isnan(means).any() else _with_gaps(means)


def _with_gaps(means: Floats) -> Floats:
    """As a product, but an item without answers spoils only the indices it is part of."""
    parts = np.where(_WEIGHTS != 0, _WEIGHTS * np.nan_to_num(means)[:, None, :], 0.0).sum(axis=2)
    spoilt = ((_WEIGHTS != 0) & np.isnan(means)[:, None, :]).any(axis=2)
    return np.where(spoilt, np.nan, parts)


def left_out_constants(raw: Floats, published: Floats) -> Floats:
    """For each culture and dimension the constant that fits all *other* cultures best, shape as `raw`.

    NaN where no other culture has both figures.
    """
    gaps = published - raw
    there = ~np.isnan(gaps)
    total = np.where(there, gaps, 0.0)
    others = total.sum(axis=0) - total
    n_others = there.sum(axis=0) - there
    return np.where(n_others > 0, others / np.maximum(n_others, 1), np.nan)


def errors(values: Floats, published: Published) -> Floats:
    """Index minus published figure, constants fitted leave-one-culture-out; NaN where one is missing."""
    raw, figures = raw_indices(values), _array(published)
    return raw + left_out_constants(raw, figures) - figures


def rmse_of(values: Floats, published: Published, culture: int | None = None) -> float:
    """Root mean square error over the dimensions present, of one culture or of all."""
    wrong = errors(values, published)
    wrong = wrong if culture is None else wrong[culture]
    there = wrong[~np.isnan(wrong)]
    return float(np.sqrt(np.mean(there**2))) if there.size else float("nan")


def euclid_of(values: Floats, published: Published) -> float:
    """Mean over cultures of the paper's Euclidean distance: constants of 50, dimensions present summed."""
    apart = raw_indices(values) + PAPER_CONSTANT - _array(published)
    there = ~np.isnan(apart)
    if not there.any():
        return float("nan")
    lengths = np.sqrt(np.where(there, apart**2, 0.0).sum(axis=1))
    return float(lengths[there.any(axis=1)].mean())


def spearman_of(values: Floats, published: Published) -> float:
    """Rank correlation across cultures, mean of the dimensions on which cultures differ at all.

    It needs no constants. NaN below three cultures.
    """
    raw, figures = raw_indices(values), _array(published)
    found: list[float] = []
    for mine, theirs in zip(raw.T, figures.T, strict=True):
        there = ~(np.isnan(mine) | np.isnan(theirs))
        if there.sum() >= 3 and not np.isnan(one := stats.spearman(mine[there], theirs[there])):
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
