"""Task files of moderation (TOML): what a labelled set's columns and labels mean.

`config/moderation/` holds some; a user can bring others.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from culturepark.cultures import CULTURE_ID
from culturepark.errors import ConfigError
from culturepark.paths import config_dir

SYNTHETIC = "synthetic"
"""The set that comes with the project."""
UNREADABLE_FIX = "Check the path, and that you may read the file."
"""The advice about a file that cannot be opened."""
_EXAMPLE = "Compare it with a file of `config/moderation/`."

Column = str | int
"""A column by its name, or by its number from 1 in a file without a header."""


class Votes(Struct, frozen=True, forbid_unknown_fields=True):
    """How annotators' votes become a class: `reached` if any of the columns holds at least `at_least`."""

    columns: tuple[Column, ...]
    at_least: float
    reached: str
    otherwise: str


class Task(Struct, frozen=True, forbid_unknown_fields=True):
    """What a labelled set is, and how its file is read.

    `classes` are the options as a model reads them, by class; `mapping` has the class of each label. A
    cell with several labels is split at `separator`, and labels of several classes make the class `any_of`;
    `votes` replaces `label` where annotators were counted. The culture is that of all texts or, with
    `culture_column`, a text's own. `file` is relative to the task file. `quotes`: whether quotation marks
    around a cell are removed; None: in CSV they are, in TSV they are not. `note` goes with each figure.
    """

    name: str
    language: str
    prompt: str
    classes: dict[str, str]
    text: Column
    licence: str
    culture: str = ""
    culture_column: Column = ""
    format: Literal["csv", "tsv", "jsonl"] = "csv"
    header: bool = True
    quotes: bool | None = None
    label: Column = ""
    mapping: dict[str, str] = {}
    separator: str = ""
    any_of: str = ""
    votes: Votes | None = None
    unknown: Literal["refuse", "drop"] = "refuse"
    file: str = ""
    source: str = ""
    citation: str = ""
    note: str = ""

    @property
    def columns(self) -> tuple[Column, ...]:
        """All that are read."""
        labels = self.votes.columns if self.votes else (self.label,)
        return (self.text, *labels, *((self.culture_column,) if self.culture_column else ()))


def shipped_tasks() -> dict[str, Path]:
    """Task files that come with the project, by the name of their set."""
    return {path.stem: path for path in sorted((config_dir() / "moderation").glob("*.toml"))}


def read_task(path: Path) -> Task:
    """A task file, checked. Raises ConfigError naming what is wrong."""
    try:
        task = msgspec.toml.decode(path.read_bytes(), type=Task)
    except OSError as error:
        what = f"it cannot be read: {error.strerror}."
        raise ConfigError(str(path), what, UNREADABLE_FIX) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), "the file is not UTF-8 text.", "Save it as UTF-8.") from None
    except msgspec.DecodeError as error:
        raise ConfigError(str(path), f"it is no task file: {error}.", _EXAMPLE) from None
    for key, what in _faults(task):
        raise ConfigError(f"{path}: $.{key}", what, _EXAMPLE)
    return task


def _faults(task: Task) -> Iterator[tuple[str, str]]:
    """Keys that cannot serve, and why."""
    if not CULTURE_ID.fullmatch(task.name):
        yield "name", "it takes lower-case letters, digits and hyphens."
    if not task.prompt.strip():
        yield "prompt", "it is empty."
    if bool(task.culture) == (task.culture_column != ""):
        yield "culture", "set either it or culture_column."
    yield from _faults_of_columns(task)
    yield from _faults_of_classes(task)


def _faults_of_columns(task: Task) -> Iterator[tuple[str, str]]:
    columns = [column for column in task.columns if column != ""]
    if not task.text:
        yield "text", "it names no column."
    if (task.votes is not None) == (task.label != ""):
        yield "label", "set either it or votes."
    if task.votes is not None and not task.votes.columns:
        yield "votes.columns", "it is empty."
    if task.format == "jsonl" and not task.header:
        yield "header", "lines of JSONL name their columns."
    if any(isinstance(column, int) == task.header for column in columns):
        yield "header", "columns have names where there is a header, else numbers from 1."
    if any(isinstance(column, int) and column < 1 for column in columns):
        yield "text", "columns count from 1."


def _faults_of_classes(task: Task) -> Iterator[tuple[str, str]]:
    votes, classes = task.votes, set(task.classes)
    reached = {votes.reached, votes.otherwise} if votes else set(task.mapping.values())
    if len(classes) < 2:
        yield "classes", "there have to be two at least."
    if not all(line and line.isprintable() for line in (*task.classes, *task.classes.values())):
        yield "classes", "each has a name and words, on one line."
    if len({" ".join(words.casefold().split()) for words in task.classes.values()}) < len(classes):
        yield "classes", "two of them read alike."
    if votes is None and not task.mapping:
        yield "mapping", "it is empty, so no label means anything."
    if reached - classes:
        yield "votes" if votes else "mapping", f"there is no class {min(reached - classes)!r}."
    if classes - reached:
        yield "classes", f"nothing becomes {min(classes - reached)!r}."
    if bool(task.any_of) != bool(task.separator):
        yield "any_of", "set both it and separator, or neither."
    if task.any_of and task.any_of not in classes:
        yield "any_of", f"there is no class {task.any_of!r}."


def find_labelled(words: str) -> tuple[Task, Path]:
    """What `--labelled` names: `NAME=FILE` for a task file that ships, `TASK.toml=FILE`, or a task file
    that names its own file. Raises ConfigError."""
    shipped = shipped_tasks()
    name, _, file = words.partition("=")
    if Path(words).is_file():
        name, file = words, ""
    path = shipped.get(name) or Path(name)
    if name not in shipped and path.suffix != ".toml":
        near = difflib.get_close_matches(name, shipped, n=1)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        fix = f"{hint}Name a task file of yours, or one of these with its file: {', '.join(shipped)}."
        raise ConfigError("--labelled", f"there is no task {name!r}.", fix)
    task = read_task(path)
    if file:
        return task, Path(file)
    if not task.file:
        get = f" It comes from {task.source}." if task.source else ""
        fix = f"Add the file: `--labelled {name}=FILE`.{get}"
        raise ConfigError("--labelled", f"{name} does not come with its texts.", fix)
    return task, path.parent / task.file
