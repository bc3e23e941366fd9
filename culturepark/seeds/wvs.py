"""Answer distributions from the user's own World Values Survey wave-7 file (CSV).

Facts about the file: https://www.worldvaluessurvey.org, doi:10.14281/18241.20, releases v5 and v6.
The survey forbids passing its interviews on, so only shares leave this module.
"""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TextIO

import msgspec

from culturepark.errors import SeedError
from culturepark.seeds.builtin import WVS7_SURVEY, WVS7_WAVE, builtin_seeds, wvs7_column
from culturepark.seeds.check import check_seed, unreadable
from culturepark.seeds.imported import ImportResult
from culturepark.seeds.model import Answers, Seed

COUNTRY, INTERVIEW, WEIGHT = "B_COUNTRY_ALPHA", "D_INTERVIEW", "W_WEIGHT"

_HEADER_WITHIN_LINES = 50
"""The header is looked for in this many lines at the beginning; some copies carry notes above it."""
_LONGEST_HEADER_LINE = 1_000_000
"""Of each of these lines at most this many characters are read."""
_MISSING_REASONS = {-1: "dont_know", -2: "no_answer", -3: "not_applicable", -4: "not_asked", -5: "other"}


def import_wvs(
    path: str | os.PathLike[str],
    items: Sequence[Seed] | None = None,
    countries: Collection[str] | None = None,
    weighted: bool = False,
) -> ImportResult:
    """Count the answers to `items` in a WVS wave-7 CSV file, by country.

    `items` are seeds with ids of the form `wvs7-q27` (default: the built-in ones); whatever answers
    they hold are replaced. `countries` are ISO alpha-3 codes (default: all in the file). Negative
    and blank codes are missing, never a value; an item without a valid answer in a country gets
    empty shares there. Shares are unweighted; `weighted` adds weighted ones by W_WEIGHT. The file
    is read as a stream: memory grows with the interview ids and the counts only.

    Raises SeedError naming the line of a code outside its item's scale, of a broken or repeated
    interview, or of a weight that is no number; or when the header, every item, a wanted country
    or the wanted weight is not in the file.
    """
    wanted = builtin_seeds() if items is None else tuple(items)
    try:
        # utf-8-sig: releases begin with a byte order mark.
        with open(path, encoding="utf-8-sig", newline="") as file:
            return _read(file, str(path), wanted, None if countries is None else set(countries), weighted)
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise SeedError(
            str(path),
            f"it is not UTF-8 text (byte {error.start}).",
            "Unpack the zip and give the .csv inside.",
        ) from error


class _Tally:
    """Counts of one country: answers by code, and their weights, for each item."""

    def __init__(self, n_items: int) -> None:
        self.interviews = 0
        self.counts: list[Counter[int | None]] = [Counter() for _ in range(n_items)]
        self.weights: list[dict[int, float]] = [{} for _ in range(n_items)]


def _read(
    file: TextIO, path: str, wanted: tuple[Seed, ...], countries: set[str] | None, weighted: bool
) -> ImportResult:
    header, delimiter, header_line = _find_header(file, path)
    column = {name: index for index, name in enumerate(header)}
    names = {seed.id: wvs7_column(seed.id) for seed in wanted}
    items = [seed for seed in wanted if names[seed.id] in column]
    if not items:
        raise SeedError(
            path, "it holds none of the wanted items.", "Is this the wave-7 file? Items are Q1 ... Q290."
        )
    needed = [COUNTRY, INTERVIEW, *(names[seed.id] for seed in items)]
    if weighted:
        if WEIGHT not in column:
            raise SeedError(
                path, f"weights are asked for, but there is no column {WEIGHT}.", "Import unweighted."
            )
        needed.append(WEIGHT)
    for name in needed:
        if name not in column:
            raise SeedError(path, f"there is no column {name}.", "Use the file as the survey publishes it.")
        if header.count(name) > 1:
            raise SeedError(
                path, f"the column {name} comes twice.", "Use the file as the survey publishes it."
            )

    indices = [column[names[seed.id]] for seed in items]
    scales = [frozenset(option.code for option in seed.options) for seed in items]
    parsed: dict[str, int | None] = {}
    tallies: dict[str, _Tally] = {}
    interviews: set[str] = set()
    rows = 0
    for line, row in _rows(file, path, delimiter, header_line, len(header)):
        where = f"{path}: line {line}"
        rows += 1
        interview = row[column[INTERVIEW]].strip()
        if not interview or interview in interviews:
            fault = f"interview {interview} came before" if interview else "the interview has no id"
            raise SeedError(where, f"{fault} ({INTERVIEW}).", "Use the file as the survey publishes it.")
        interviews.add(interview)
        country = row[column[COUNTRY]].strip()
        if not country:
            raise SeedError(
                where, f"the country is blank ({COUNTRY}).", "Use the file as the survey publishes it."
            )
        if countries is not None and country not in countries:
            continue
        tally = tallies.get(country)
        if tally is None:
            tally = tallies[country] = _Tally(len(items))
        tally.interviews += 1
        weight = _weight(row[column[WEIGHT]], where) if weighted else 0.0
        for item, index in enumerate(indices):
            text = row[index]
            if text not in parsed:
                parsed[text] = _code(text, f"{where}: {header[index]}")
            code = parsed[text]
            if code is not None and code >= 0:
                if code not in scales[item]:
                    raise SeedError(
                        f"{where}: {header[index]}",
                        f"the answer {code} is not on the item's scale {sorted(scales[item])}.",
                        "Correct the item's options, or leave the item out.",
                    )
                if weighted:
                    tally.weights[item][code] = tally.weights[item].get(code, 0.0) + weight
            tally.counts[item][code] += 1

    absent = sorted((countries or set()) - set(tallies))
    if absent or not tallies:
        what = f"no interview is from {', '.join(absent)}." if absent else "it holds no interview."
        raise SeedError(path, what, "Countries are named by ISO alpha-3 code in capitals, such as JOR.")
    return ImportResult(
        seeds=tuple(_seed(seed, item, tallies, weighted, path) for item, seed in enumerate(items)),
        rows=rows,
        countries={country: tally.interviews for country, tally in tallies.items()},
        skipped_items=tuple(seed.id for seed in wanted if names[seed.id] not in column),
    )


def _find_header(file: TextIO, path: str) -> tuple[list[str], str, int]:
    """The header's names, the delimiter, and the header's line number. Some copies carry notes above it."""
    for number in range(1, _HEADER_WITHIN_LINES + 1):
        line = file.readline(_LONGEST_HEADER_LINE)
        if COUNTRY not in line:
            continue
        for delimiter in ",;":
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]
            if COUNTRY in names:
                return names, delimiter, number
    raise SeedError(
        path,
        f"no line of the first {_HEADER_WITHIN_LINES} is a header with {COUNTRY}.",
        "Give the wave-7 CSV file of the World Values Survey, unpacked.",
    )


def _rows(
    file: TextIO, path: str, delimiter: str, header_line: int, width: int
) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            line = header_line + reader.line_num
            if len(row) == width:
                yield line, row
            elif row:
                raise SeedError(
                    f"{path}: line {line}",
                    f"the row has {len(row)} columns and the header {width}.",
                    "The file is cut short or damaged: download it again.",
                )
    except csv.Error as error:
        raise SeedError(
            f"{path}: line {header_line + reader.line_num}",
            f"the row is not CSV: {error}.",
            "The file is cut short or damaged: download it again.",
        ) from error


def _code(text: str, where: str) -> int | None:
    """The code a field spells (`1` and `1.0` alike); None for a blank. Raises SeedError otherwise."""
    if not text.strip():
        return None
    try:
        value = float(text)
        if value.is_integer():
            return int(value)
    except ValueError:
        pass
    raise SeedError(where, f"{text!r} is no answer code.", "Codes are whole numbers.")


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise SeedError(f"{where}: {WEIGHT}", f"{text!r} is no weight.", "Weights are numbers from 0 up.")
    return weight


def _seed(seed: Seed, item: int, tallies: dict[str, _Tally], weighted: bool, path: str) -> Seed:
    answers = {
        country: _answers(seed, country, tally, item, weighted, path) for country, tally in tallies.items()
    }
    filled = msgspec.structs.replace(seed, answers=answers, survey=WVS7_SURVEY, wave=WVS7_WAVE)
    check_seed(filled, path)
    return filled


def _answers(seed: Seed, country: str, tally: _Tally, item: int, weighted: bool, path: str) -> Answers:
    valid: dict[int, int] = {}
    missing: dict[str, float] = {}
    for code, count in tally.counts[item].items():
        if code is not None and code >= 0:
            valid[code] = count
        else:
            reason = "blank" if code is None else _MISSING_REASONS.get(code, f"code {code}")
            missing[reason] = missing.get(reason, 0) + count
    n_valid = sum(valid.values())
    weighted_shares = None
    if weighted:
        weights = tally.weights[item]
        total = math.fsum(weights.values())
        if valid and total == 0:
            raise SeedError(
                f"{path}: {seed.id}: {country}", f"all weights ({WEIGHT}) are 0.", "Import unweighted."
            )
        weighted_shares = {code: weights[code] / total for code in sorted(weights)}
    return Answers(
        country=country,
        shares={code: valid[code] / n_valid for code in sorted(valid)},
        n_valid=n_valid,
        n_missing=sum(tally.counts[item].values()) - n_valid,
        missing=missing,
        weighted_shares=weighted_shares,
        source=f"World Values Survey wave 7, {os.path.basename(path)}",
    )
