"""Results: as files that other programs read, and as one table."""

# pyarrow ships no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from culturepark import __version__
from culturepark.errors import ConfigError
from culturepark.evaluation.measure import Better, Comparison, Measurement
from culturepark.evaluation.statistics import none_if_nan
from culturepark.store.files import disk_errors, make_dirs, write_atomically
from culturepark.versions import PROMPT_VERSION

REPORT, MEASUREMENTS = "report.json", "measurements.json"
FIGURES, COMPARISONS = "figures.parquet", "comparisons.parquet"
FLOORS = ("constant", "random", "majority", "others")


class Figure(Struct, frozen=True):
    """One row of the results: a figure, its 95 % interval, and the figures of baselines that know nothing
    (floors)."""

    model: str
    task: str
    subset: str
    metric: str
    better: Better
    value: float | None
    low: float | None
    high: float | None
    floor_constant: float | None
    floor_random: float | None
    floor_majority: float | None
    floor_others: float | None
    n: int
    unit: str
    n_units: int
    draws: int
    invalid_rate: float


class EvaluationReport(Struct, frozen=True):
    """All that one evaluation found. `notes` are cautions that go with figures."""

    figures: tuple[Figure, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    code_version: str = __version__
    prompt_version: str = PROMPT_VERSION


Measured = dict[str, list[Measurement]]
"""Measurements by model, in the order of the models."""


def report_of(
    measured: Measured, comparisons: Sequence[Comparison], notes: Sequence[str] = ()
) -> EvaluationReport:
    """Figures with their intervals, models in turn."""
    figures = tuple(_figure(model, one) for model, found in measured.items() for one in found)
    own = (note for found in measured.values() for one in found for note in one.notes)
    return EvaluationReport(figures, tuple(comparisons), tuple(dict.fromkeys((*notes, *own))))


def _figure(model: str, of: Measurement) -> Figure:
    interval = of.interval()
    floors = {name: none_if_nan(of.floors.get(name)) for name in FLOORS}
    return Figure(
        model,
        of.task,
        of.subset,
        of.metric,
        of.better,
        interval.value,
        interval.low,
        interval.high,
        floors["constant"],
        floors["random"],
        floors["majority"],
        floors["others"],
        of.n,
        of.unit,
        len(of.units),
        of.draws,
        of.invalid_rate,
    )


# --- files


def check_free(out: Path, force: bool) -> None:
    """Refuse to write over results, before any are made. Raises ConfigError."""
    if (out / REPORT).exists() and not force:
        fix = "Name another directory, or add --force to overwrite them."
        raise ConfigError("--out", f"{out} holds results already.", fix)


def write_report(out: Path, report: EvaluationReport, measured: Measured) -> None:
    """Write the results to a directory: as JSON and Parquet, and unit by unit. Raises RunDirError."""
    make_dirs(out)
    write_atomically(out / MEASUREMENTS, msgspec.json.encode(measured))
    _write_rows(out / FIGURES, _FIGURES, [msgspec.to_builtins(one) for one in report.figures])
    _write_rows(out / COMPARISONS, _COMPARISONS, [_flat(one) for one in report.comparisons])
    # Last: its presence means that all of it is there.
    write_atomically(out / REPORT, msgspec.json.format(msgspec.json.encode(report), indent=1))


def read_measurements(out: Path) -> Measured:
    """Measurements of an earlier evaluation, to be compared with others. Raises ConfigError."""
    path = out / MEASUREMENTS
    try:
        return msgspec.json.decode(path.read_bytes(), type=Measured)
    except (OSError, msgspec.MsgspecError) as error:
        fix = "Name a directory that `culturepark evaluate --out` made."
        raise ConfigError(str(path), f"it cannot be read: {error}.", fix) from None


_S, _F, _I = pa.string(), pa.float64(), pa.int64()
_TYPES = {"str": _S, "Better": _S, "int": _I, "float": _F, "float | None": _F}
_FIGURES: Any = pa.schema([(name, _TYPES[str(kind)]) for name, kind in Figure.__annotations__.items()])
_COMPARISONS: Any = pa.schema(
    [(name, _S) for name in ("task", "subset", "metric", "better", "first", "second")]
    + [(name, _F) for name in ("difference", "low", "high", "p", "p_holm")]
    + [("n_units", _I)]
)


def _flat(one: Comparison) -> dict[str, object]:
    row: dict[str, object] = msgspec.to_builtins(one)
    difference = one.difference
    row["difference"] = difference.value if difference else None
    for name in ("low", "high", "p"):
        row[name] = getattr(difference, name) if difference else None
    return row


def _write_rows(path: Path, schema: Any, rows: list[dict[str, object]]) -> None:
    sink: Any = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    with disk_errors(path):
        write_atomically(path, sink.getvalue().to_pybytes())
