"""Labelled texts: the sets of moderation, read as their task files say (`labelled_tasks`).

The user brings the sets, in the format they are published in. Problems of a set are counted and shown
(`DataIssues`), or refused before anything is asked.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from culturepark.errors import ConfigError
from culturepark.evaluation.labelled_tasks import UNREADABLE_FIX, Task
from culturepark.text import tidy
from culturepark.words import plural

MIN_CLASS_TEXTS = 30
"""A class with fewer texts than this has an F1 that says little."""
_SHOWN_LABELS = 5
"""An error names at most this many labels."""


class Row(Struct, frozen=True):
    """A text, its place in the file from 1, its culture, and its class by its place among the task's."""

    number: int
    text: str
    culture: str
    label: int


class DataIssues(Struct, frozen=True):
    """The problems of a labelled set (data quality).

    Dropped: rows of too few or too many cells (`ragged`), and those without a text, a label, or a label that
    the mapping knows. Kept: `duplicates`, further rows of an earlier text, and `contradictions`, texts with
    several classes. `few` counts the texts of classes that have under 30. Dropped rows are counted in the
    file, kept ones among the texts that are asked about.
    """

    rows: int
    ragged: int = 0
    blank_texts: int = 0
    blank_labels: int = 0
    unknown: int = 0
    duplicates: int = 0
    contradictions: int = 0
    few: dict[str, int] = {}

    @property
    def words(self) -> tuple[str, ...]:
        """Each issue that occurs, in words."""
        counts = (
            (self.ragged, "row", "with too few or too many cells, dropped"),
            (self.blank_texts, "row", "without a text, dropped"),
            (self.blank_labels, "row", "without a label, dropped"),
            (self.unknown, "row", "with a label that the mapping does not know, dropped"),
            (self.duplicates, "row", "repeating a text, kept"),
            (self.contradictions, "text", "with contradicting labels, kept"),
        )
        few = (
            f'only {plural(n, "text")} of the class "{name}", so its F1 says little'
            for name, n in self.few.items()
        )
        return (*(f"{plural(n, what)} {words}" for n, what, words in counts if n), *few)


class LabelledSet(Struct, frozen=True):
    """Texts with their classes. `selection` says how they were selected if they are not all."""

    task: Task
    rows: tuple[Row, ...]
    issues: DataIssues
    selection: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes on each figure of this set."""
        notes = (self.task.note.removesuffix("."), *self.selection, *self.issues.words)
        return tuple(f"{self.task.name}: {words}." for words in notes if words)


# --- sets


def read_labelled(task: Task, path: Path) -> LabelledSet:
    """The texts of a file with their classes. Raises ConfigError for a file that is not as the task says,
    and for labels that its mapping does not know, unless it drops them."""
    counts: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    first_unknown = 0
    rows: list[Row] = []
    places = {name: place for place, name in enumerate(task.classes)}
    for number, record in enumerate(_records(task, path), start=1):
        counts["rows"] += 1
        if record is None:
            counts["ragged"] += 1
            continue
        text = _text_of(record[str(task.text)], f"{path}: row {number}: {task.text}")
        labels = _labels_of(task, record)
        if not tidy(text):
            counts["blank_texts"] += 1
        elif not labels:
            counts["blank_labels"] += 1
        elif (name := class_of(task, labels)) is None:
            first_unknown = first_unknown or number
            unknown[task.separator.join(labels) if task.separator else ", ".join(labels)] += 1
        else:
            culture = str(record[str(task.culture_column)]).strip() if task.culture_column else task.culture
            rows.append(Row(number, text, culture, places[name]))
    if unknown and task.unknown == "refuse":
        raise _unknown_labels(task, path, first_unknown, unknown)
    if not rows:
        raise ConfigError(str(path), f"it holds no text that {task.name} can use.", "Is it the right file?")
    issues = DataIssues(
        rows=counts["rows"],
        ragged=counts["ragged"],
        blank_texts=counts["blank_texts"],
        blank_labels=counts["blank_labels"],
        unknown=unknown.total(),
    )
    return with_issues(LabelledSet(task, tuple(rows), issues))


def with_issues(of: LabelledSet) -> LabelledSet:
    """The set with the issues of its rows: duplicates, contradictions, classes of few texts."""
    classes: dict[str, set[int]] = {}
    for row in of.rows:
        classes.setdefault(" ".join(row.text.split()), set()).add(row.label)
    sizes = Counter(row.label for row in of.rows)
    issues = replace(
        of.issues,
        duplicates=len(of.rows) - len(classes),
        contradictions=sum(len(found) > 1 for found in classes.values()),
        few={
            name: sizes[place] for place, name in enumerate(of.task.classes) if sizes[place] < MIN_CLASS_TEXTS
        },
    )
    return replace(of, issues=issues)


def only_cultures(of: LabelledSet, cultures: Iterable[str]) -> LabelledSet:
    """The texts of these cultures. Raises ConfigError if there are none."""
    wanted = set(cultures)
    rows = tuple(row for row in of.rows if row.culture in wanted)
    if not rows:
        here = ", ".join(sorted({row.culture for row in of.rows}))
        fix = "Name one of these with --culture, or leave the set out."
        raise ConfigError("--labelled", f"{of.task.name} has texts of {here}, which is not evaluated.", fix)
    if len(rows) == len(of.rows):
        return of
    rest = sorted({row.culture for row in of.rows} - wanted)
    left_out = plural(len(of.rows) - len(rows), "text")
    words = f"{left_out} left out, of {', '.join(rest)}, which is not evaluated"
    return with_issues(replace(of, rows=rows, selection=(*of.selection, words)))


def stratified_sample(of: LabelledSet, at_most: int | None, rng_seed: int = 0) -> LabelledSet:
    """At most `at_most` texts, in the file's order: each class in its share, drawn with the seed."""
    if at_most is None or len(of.rows) <= at_most:
        return of
    rng = random.Random(f"labelled:{rng_seed}:{of.task.name}")
    keyed: list[tuple[float, Row]] = []
    for place in range(len(of.task.classes)):
        mine = [row for row in of.rows if row.label == place]
        # A class's rows, shuffled, spread evenly over 0 to 1: what comes first holds all in their shares.
        keyed += [((rank + 0.5) / len(mine), row) for rank, row in enumerate(rng.sample(mine, len(mine)))]
    keyed.sort(key=lambda one: one[0])
    rows = tuple(sorted((row for _, row in keyed[:at_most]), key=lambda row: row.number))
    words = (
        f"{len(rows):,} of {len(of.rows):,} texts, each class in its share, drawn with the seed {rng_seed}"
    )
    return with_issues(replace(of, rows=rows, selection=(*of.selection, words)))


def class_of(task: Task, labels: Sequence[str]) -> str | None:
    """The class of a text with these labels or votes; None if the task does not know them."""
    if task.votes:
        votes = [_number(label) for label in labels]
        if None in votes:
            return None
        highest = max(value for value in votes if value is not None)
        return task.votes.reached if highest >= task.votes.at_least else task.votes.otherwise
    classes = {task.mapping.get(label) for label in labels}
    if len(classes) == 1:
        return classes.pop()
    return task.any_of if None not in classes and task.any_of in classes else None


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _labels_of(task: Task, record: Mapping[str, object]) -> tuple[str, ...]:
    """Labels of a text, or its votes; nothing where the cell is blank."""
    if task.votes:
        cells = [_label(record[str(column)]) for column in task.votes.columns]
        return tuple(cells) if any(cells) else ()
    value = record[str(task.label)]
    if isinstance(value, list) and task.separator:
        parts = [_label(one) for one in cast(list[object], value)]
    else:
        whole = _label(cast(object, value))
        parts = whole.split(task.separator) if task.separator else [whole]
    return tuple(part.strip() for part in parts if part.strip())


def _label(value: object) -> str:
    """A label as text; a value of JSON that is no string as JSON writes it."""
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else _as_json(value)


def _as_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _text_of(value: object, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        what = f"this is {_as_json(value)[:40]}, and no text."
        raise ConfigError(where, what, "Name the column of the texts in the task file, or mend the line.")
    return value.strip()


def _unknown_labels(task: Task, path: Path, first: int, unknown: Counter[str]) -> ConfigError:
    names = ", ".join(repr(label[:40]) for label, _ in unknown.most_common(_SHOWN_LABELS))
    more = ", ..." if len(unknown) > _SHOWN_LABELS else ""
    count = f"{plural(unknown.total(), 'row')}, the first is {first}"
    what = f"{task.name} does not know {names}{more} ({count})."
    known = "numbers" if task.votes else ", ".join(repr(label) for label in task.mapping)
    fix = f'It knows {known}. Map the rest in a task file of your own, or drop it there: unknown = "drop".'
    return ConfigError(f"{path}: {task.label or 'votes'}", what, fix)


# --- files


_Record = Mapping[str, object] | None
"""Cells by column; None for a row with another number of cells than the first."""


def _records(task: Task, path: Path) -> Iterator[_Record]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from (
                _json_records(task, path, lines) if task.format == "jsonl" else _cells(task, path, lines)
            )
    except OSError as error:
        what = f"it cannot be read: {error.strerror}."
        raise ConfigError(str(path), what, UNREADABLE_FIX) from None
    except UnicodeDecodeError:
        fix = f"Save it as {task.format.upper()} in UTF-8."
        raise ConfigError(str(path), "the file is not UTF-8 text.", fix) from None
    except csv.Error as error:
        fix = f"Is it {task.format.upper()}, with `quotes` as the task file says?"
        raise ConfigError(str(path), f"it cannot be parsed: {error}.", fix) from None


def _cells(task: Task, path: Path, lines: Iterable[str]) -> Iterator[_Record]:
    quoted = task.quotes if task.quotes is not None else task.format == "csv"
    reader = csv.reader(
        lines,
        delimiter="\t" if task.format == "tsv" else ",",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    names: list[str] | None = None
    for cells in reader:
        if not cells:
            continue  # a blank line
        if names is None:
            numbers = [str(place) for place in range(1, len(cells) + 1)]
            names = [cell.strip() for cell in cells] if task.header else numbers
            _check_columns(task, path, names)
            if task.header:
                continue
        yield dict(zip(names, cells, strict=True)) if len(cells) == len(names) else None


def _json_records(task: Task, path: Path, lines: Iterable[str]) -> Iterator[_Record]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError as error:
            fix = "Each line is one JSON object."
            raise ConfigError(f"{path}: line {number}", f"this is no row: {error}.", fix) from None
        _check_columns(task, path, list(record))
        yield record


def _check_columns(task: Task, path: Path, names: Sequence[str]) -> None:
    if absent := [column for column in task.columns if str(column) not in names]:
        known = ", ".join(name[:40] for name in names[:20])
        fix = f"There are: {known}. Is it the file that {task.name} is about, with a header if it says so?"
        raise ConfigError(str(path), f"there is no column {absent[0]}.", fix)
