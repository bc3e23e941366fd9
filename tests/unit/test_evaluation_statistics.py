"""The arithmetic of evaluation against naive oracles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from culturepark.evaluation import statistics as stats
from culturepark.evaluation.measure import (
    Comparison,
    Measurement,
    compare,
    compare_pairs,
    holm_corrected,
    rows_of,
)
from culturepark.evaluation.statistics import Difference

shares = st.integers(2, 8).flatmap(
    lambda k: st.tuples(
        *[st.lists(st.integers(0, 9), min_size=k, max_size=k).filter(any).map(np.array) for _ in range(2)]
    )
)


@given(shares)
def test_distances_of_distributions(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = (one / one.sum() for one in pair)
    mid = (p + q) / 2
    naive = sum(
        0.5 * a * math.log2(a / m) for side in (p, q) for a, m in zip(side, mid, strict=True) if a > 0
    )
    assert stats.jensen_shannon(*pair) == pytest.approx(naive, abs=1e-9)
    assert stats.jensen_shannon(*pair) == pytest.approx(stats.jensen_shannon(*pair[::-1]))
    # Earth moved greedily from the left, one heap at a time, is optimal in one dimension.
    left, right, moved = list(p), list(q), 0.0
    i = j = 0
    while i < len(left) and j < len(right):
        take = min(left[i], right[j])
        moved += take * abs(i - j)
        left[i] -= take
        right[j] -= take
        i, j = (i + 1, j) if left[i] <= right[j] else (i, j + 1)
    assert stats.earth_mover(*pair) == pytest.approx(moved / (len(p) - 1), abs=1e-9)
    assert 0 <= stats.earth_mover(*pair) <= 1 + 1e-12


def test_ends_of_distances() -> None:
    assert stats.jensen_shannon([1, 0], [0, 1]) == 1
    assert stats.earth_mover([1, 0, 0], [0, 0, 1]) == 1
    assert stats.earth_mover([1, 0, 0], [0, 1, 0]) == 0.5
    assert stats.entropy_ratio([1, 1, 0, 0], [1, 1, 1, 1]) == 0.5
    assert math.isnan(stats.entropy_ratio([1, 1], [1, 0]))
    with pytest.raises(ValueError, match="shares"):
        stats.jensen_shannon([0, 0], [1, 0])


labels = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), min_size=1, max_size=40)


@given(labels)
def test_f1_from_precision_and_recall(pairs: list[tuple[int, int]]) -> None:
    truth, said = zip(*pairs, strict=True)
    each: list[float] = []
    for one in sorted(set(truth)):
        hits = sum(t == s == one for t, s in pairs)
        precision, recall = hits / (said.count(one) or 1), hits / truth.count(one)
        each.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert stats.macro_f1(truth, said) == pytest.approx(sum(each) / len(each))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30))
def test_ranks_correlation_and_kappa(pairs: list[tuple[int, int]]) -> None:
    a, b = (list(side) for side in zip(*pairs, strict=True))
    for side in (a, b):
        naive = [sum(x < y for x in side) + (sum(x == y for x in side) + 1) / 2 for y in side]
        assert list(stats.ranks(side)) == naive
    rho = stats.spearman(a, b)
    assert math.isnan(rho) == (len(set(a)) == 1 or len(set(b)) == 1)
    if not math.isnan(rho):
        assert stats.spearman(a, [-x for x in b]) == pytest.approx(-rho)
    n = len(pairs)
    chance = sum((x == y) for x, y in itertools.product(a, b)) / n**2
    tables = np.zeros((n, 5, 5))
    tables[np.arange(n), a, b] = 1
    kappa = stats.cohen_kappa(tables.reshape(n, -1))
    assert math.isnan(kappa) == (chance == 1)
    if chance < 1:
        assert kappa == pytest.approx((sum(x == y for x, y in pairs) / n - chance) / (1 - chance))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_helps_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = stats.holm(p_values)
    assert all(c >= p and c <= 1 for c, p in zip(corrected, p_values, strict=True))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [corrected[i] for i in order] == sorted(corrected)
    assert min(corrected) == min(1.0, min(p_values) * len(p_values))


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_groups_that_were_corrected_apart_are_corrected_together() -> None:
    def compared(p: float, alone: float) -> Comparison:
        return Comparison("t", "all", "m", "higher", "a", "b", Difference(0.1, 0, 0.2, p), 9, alone)

    without = Comparison("t", "all", "m", "higher", "a", "b", None, 0)
    found = holm_corrected([compared(0.01, 0.01), without, compared(0.04, 0.06), compared(0.03, 0.06)])
    assert [one.p_holm for one in found] == [pytest.approx(0.03), None, *[pytest.approx(0.06)] * 2]


@given(st.integers(0, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation(counts: tuple[int, int]) -> None:
    hits, n = counts
    low, high = stats.wilson(hits, n)
    assert 0 <= low <= (hits / n if n else 0.5) + 1e-9
    assert (hits / n if n else 0.5) - 1e-9 <= high <= 1
    for bound in (low, high):
        if n and 1e-9 < bound < 1 - 1e-9:
            z = (hits / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert abs(z) == pytest.approx(1.96, abs=1e-3)


def test_distinct_n() -> None:
    assert stats.distinct_n(["a b a b", "A b"], 2) == 2 / 4
    assert math.isnan(stats.distinct_n(["a"], 2))


def test_bootstrap_agrees_with_theory() -> None:
    values = np.random.default_rng(3).normal(5, 2, (400, 1))
    found = stats.bootstrap(values, stats.mean)
    assert found.low is not None
    assert found.high is not None
    error = values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.05)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.05)
    assert stats.bootstrap(values, stats.mean) == found
    assert stats.bootstrap(values[:1], stats.mean).low is None
    assert stats.bootstrap(np.full((5, 1), math.nan), stats.mean).value is None


def measured(values: np.ndarray) -> list[Measurement]:
    """One figure a row, over the same units."""
    units = tuple(str(place) for place in range(values.shape[1]))
    return [
        Measurement(
            task="t",
            subset=str(place),
            metric="m",
            better="higher",
            unit="item",
            units=units,
            values=rows_of([row.tolist()]),
            n=len(units),
            draws=len(units),
            invalid_rate=0.0,
        )
        for place, row in enumerate(values)
    ]


def test_a_clear_difference_is_clear_among_many_comparisons() -> None:
    """Two thousand resamples tell no p-value below .001, which sixty comparisons make .06."""
    rng = np.random.default_rng(5)
    first = rng.normal(0, 1, (60, 100))
    second = first + rng.normal(0, 1, (60, 100))
    second[7] = first[7] + rng.normal(3, 1, 100)
    found = compare("a", measured(first), "b", measured(second))
    p_values = [one.p_holm or 0.0 for one in found]
    assert p_values[7] <= 0.01
    assert min(p_values[:7] + p_values[8:]) > 0.05
    pair = (("a", measured(first)), ("b", measured(second)))
    assert sum((one.p_holm or 0.0) <= 0.01 for one in compare_pairs([pair, pair])) == 2


def test_cells_that_one_of_two_misses_are_in_neither() -> None:
    """Question by question over two cultures; the second model leaves one culture's answer out, and of one
    question both, the first another question's."""
    first = np.array([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [math.nan, 8.0]])
    second = first + np.array([[1.0, 1.0], [1.0, 100.0], [100.0, 100.0], [100.0, 1.0]])
    second[1, 1] = second[2, 0] = second[2, 1] = math.nan

    def of(values: np.ndarray) -> list[Measurement]:
        [one] = measured(np.zeros((1, 4)))
        rows = rows_of(values.T.tolist())
        return [replace(one, values=rows, statistic="mean_of_cells", parameters={"columns": ["a", "b"]})]

    [found] = compare("a", of(first), "b", of(second))
    assert found.n_units == 3
    assert found.difference is not None
    assert (found.difference.value, found.difference.low, found.difference.high) == (1, 1, 1)


def test_figures_by_other_means_are_told_and_not_compared() -> None:
    first = measured(np.zeros((1, 5)))
    second = [replace(one, statistic="ratio") for one in first]
    [found] = compare("a", first, "b", second)
    assert (found.difference, found.n_units, found.p_holm) == (None, 0, None)


def test_what_is_asked_of_eight_cultures_is_no_surer_for_it_if_their_answers_are_alike() -> None:
    rows = np.random.default_rng(6).normal(0, 1, (30, 1))
    one, eight = (
        stats.bootstrap(np.tile(rows, (1, n)), lambda v: stats.mean_of_cells(v, ())) for n in (1, 8)
    )
    assert (eight.low, eight.high) == pytest.approx((one.low, one.high))
    rows[3] = math.nan
    assert stats.mean_of_cells(rows, ()) == pytest.approx(np.nanmean(rows))
    assert math.isnan(stats.mean_of_cells(np.full((2, 2), math.nan), ()))


def test_pairing_sees_what_two_intervals_do_not() -> None:
    rng = np.random.default_rng(4)
    first = rng.normal(0, 10, (100, 1))
    second = first + rng.normal(0.5, 0.5, (100, 1))
    difference = stats.paired_bootstrap(first, second, stats.mean)
    assert difference is not None
    assert difference.low > 0
    assert difference.p < 0.01
    same = stats.paired_bootstrap(first, first, stats.mean)
    assert same is not None
    assert (same.value, same.p) == (0, 1)
    with pytest.raises(ValueError, match="paired"):
        stats.paired_bootstrap(first, first[:5], stats.mean)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(0, 99))
def test_an_interval_lies_within_the_data(values: list[float], seed: int) -> None:
    found = stats.bootstrap(np.array(values)[:, None], stats.mean, seed, 50)
    assert found.low is not None
    assert found.high is not None
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
