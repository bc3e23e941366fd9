"""A measurement: one figure of one model, with what it needs to be believed and to be compared.

Values are kept unit by unit, so that an interval can be drawn from them, and two models' measurements
over the same units can be compared pair by pair, also later and from files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from culturepark.evaluation import hofstede
from culturepark.evaluation import statistics as stats
from culturepark.evaluation.statistics import Difference, Floats, Interval, Statistic, none_if_nan

Better = Literal["lower", "higher", "near 1", "neither"]
"""Which direction of a figure is good."""


class Measurement(Struct, frozen=True):
    """One figure. `task` and `metric` say what it is, `subset` of what: a culture, a data set, `all`.

    `values` has one row for each unit of resampling, named in `units`; None is missing. `statistic` names how
    a figure follows from the rows, with `parameters`. `floors` are the figures of baselines that know
    nothing, by name. `n` counts answers that could be read, `draws` all that was asked, `invalid_rate`
    the part of it that could not be read.
    """

    task: str
    subset: str
    metric: str
    better: Better
    unit: str
    units: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    n: int
    draws: int
    invalid_rate: float
    statistic: str = "mean"
    parameters: dict[str, Any] = {}
    floors: dict[str, float | None] = {}
    notes: tuple[str, ...] = ()
    paired: bool = True
    """Whether another model is measured on the same units; else each is resampled by itself."""
    compared: bool = True
    """Whether it is compared with another one: not where the figure changes with the amount of data, or lacks
    usage that was not reported."""
    restated: bool = False
    """Whether these are the same answers as those of the subset `all`, shown again beside targets that have
    another model for each subset."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What is measured, whichever the model."""
        return self.task, self.subset, self.metric

    @property
    def array(self) -> Floats:
        """The values, shape (units, columns); missing is NaN."""
        if not self.units:
            return np.zeros((0, 1))
        return np.array(self.values, dtype=np.float64).reshape(len(self.units), -1)

    def interval(self) -> Interval:
        """The figure with its 95 % bootstrap interval."""
        return stats.bootstrap(self.array, statistic_named(self.statistic, self.parameters))


class Comparison(Struct, frozen=True):
    """Two models on the same units, or two runs each on its own. `p_holm` is corrected for all comparisons
    made at once."""

    task: str
    subset: str
    metric: str
    better: Better
    first: str
    second: str
    difference: Difference | None
    n_units: int
    p_holm: float | None = None


def rows_of(columns: Sequence[Sequence[float | None]]) -> tuple[tuple[float | None, ...], ...]:
    """Rows from columns; what is not defined (NaN) is missing."""
    return tuple(tuple(map(none_if_nan, row)) for row in zip(*columns, strict=True))


def statistic_named(name: str, parameters: Mapping[str, Any]) -> Statistic:
    """The function that a measurement names. Raises KeyError for a name of another version."""
    return partial(_STATISTICS[name], **parameters)


Named = tuple[str, Sequence[Measurement]]
"""A model, or data, and what was measured of it."""


def compare(
    first_name: str, first: Sequence[Measurement], second_name: str, second: Sequence[Measurement]
) -> list[Comparison]:
    """`compare_pairs` of one pair."""
    return compare_pairs([((first_name, first), (second_name, second))])


def compare_pairs(pairs: Sequence[tuple[Named, Named]]) -> list[Comparison]:
    """Second against first of each pair, wherever both measured the same and one can be better, by paired
    bootstrap over the units that both have, or else each over its own (`Measurement.paired`), with p-values
    corrected after Holm over all of them."""
    resamples = stats.resamples_for(sum(len(first) for (_, first), _ in pairs))
    return holm_corrected(
        [one for first, second in pairs for one in _differences(*first, *second, resamples)]
    )


def pairs_with_first(measured: Mapping[str, Sequence[Measurement]]) -> list[tuple[Named, Named]]:
    """Pairs: the first with each further one."""
    first, *others = measured.items() or [("", ())]
    return [(first, other) for other in others]


def holm_corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with p-values corrected for the number of these alone, replacing an earlier
    correction."""
    p_values = iter(stats.holm([c.difference.p for c in comparisons if c.difference is not None]))
    return [replace(c, p_holm=next(p_values)) if c.difference is not None else c for c in comparisons]


def _differences(
    first_name: str,
    first: Sequence[Measurement],
    second_name: str,
    second: Sequence[Measurement],
    resamples: int,
) -> list[Comparison]:
    others = {one.key: one for one in second}
    found: list[Comparison] = []
    for one in first:
        other = others.get(one.key)
        if other is None or one.better == "neither" or not (one.compared and other.compared):
            continue
        if one.restated and other.restated:
            continue  # `all` compares the same answers
        if (one.statistic, one.parameters) != (other.statistic, other.parameters):
            # Another statistic, so a difference would not be that of the models.
            found.append(Comparison(*one.key, one.better, first_name, second_name, None, 0))
            continue
        if not one.paired:
            found.append(_unpaired(first_name, one, second_name, other, resamples))
            continue
        places = {unit: place for place, unit in enumerate(other.units)}
        shared = [(place, places[unit]) for place, unit in enumerate(one.units) if unit in places]
        mine = one.array[[a for a, _ in shared]]
        theirs = other.array[[b for _, b in shared]]
        if one.statistic in ("mean", "mean_of_cells"):
            # A cell that one of them lacks has no counterpart, so neither counts it.
            missing = np.isnan(mine) | np.isnan(theirs)
            present = ~missing.all(axis=1)
            mine, theirs = (np.where(missing, np.nan, values)[present] for values in (mine, theirs))
        statistic = statistic_named(one.statistic, one.parameters)
        difference = None
        if len(mine):
            difference = stats.paired_bootstrap(mine, theirs, statistic, max_resamples=resamples)
        found.append(Comparison(*one.key, one.better, first_name, second_name, difference, len(mine)))
    return found


def _unpaired(
    first_name: str, one: Measurement, second_name: str, other: Measurement, resamples: int
) -> Comparison:
    statistic = statistic_named(one.statistic, one.parameters)
    difference = stats.unpaired_bootstrap(one.array, other.array, statistic, max_resamples=resamples)
    n_units = len(one.units) + len(other.units)
    return Comparison(*one.key, one.better, first_name, second_name, difference, n_units)


def _macro_f1(values: Floats) -> float:
    return stats.macro_f1(values[:, 0], values[:, 1])


def _class_f1(values: Floats, of: int) -> float:
    return stats.class_f1(values[:, 0], values[:, 1], of)


_STATISTICS: dict[str, Any] = {
    "mean": stats.mean,
    "mean_of_cells": stats.mean_of_cells,
    "ratio": stats.ratio,
    "total": stats.total,
    "macro_f1": _macro_f1,
    "class_f1": _class_f1,
    "kappa_of_tables": stats.cohen_kappa,
    "vsm_rmse": hofstede.rmse_of,
    "vsm_euclid": hofstede.euclid_of,
    "vsm_spearman": hofstede.spearman_of,
    "vsm_index": hofstede.index_of,
}
