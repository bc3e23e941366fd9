"""Trainings on the terminal: how they stand, what they reached, and evaluation texts in their rows."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from culturepark.cli.views.terminal import safe_line
from culturepark.training.adapters import adapters_of
from culturepark.training.leakage import REPORT, LeakageReport, read_report
from culturepark.training.ports import Outcome
from culturepark.training.records import Records
from culturepark.words import clock, plural

_MATCHES_SHOWN = 3
"""How many matches of one evaluation set are shown; the report holds all."""


def show_trainings(console: Console, root: Path) -> None:
    """How each training on record stands, and whether texts of evaluation sets are in its rows (leakage)."""
    latest = {record.job.name: record for record in Records(root).all()}
    for name, record in sorted(latest.items()):
        words = {"intended": "about to start", "launched": "launched"}.get(record.event, record.event)
        console.print(safe_line(f"tuning of {name}: {words}"))
        dataset = root / record.job.dataset
        if (leaks := read_report(dataset)) and leaks.matches:
            finds = plural(len(leaks.matches), "find")
            words = f"{finds} of evaluation texts in its rows: {dataset / REPORT}"
            console.print(safe_line(words, "yellow"), soft_wrap=True)


def show_leakage(console: Console, dataset: str, report: LeakageReport) -> None:
    """The evaluation texts that were found in the training rows of one dataset."""
    for name, items in report.items.items():
        found = [match for match in report.matches if match.set_name == name]
        if not found:
            continue
        words = f"{dataset}: {len(found)} of {plural(items, 'text')} of {name} are in its training rows:"
        console.print(safe_line(words, "yellow"))
        for match in found[:_MATCHES_SHOWN]:
            words = f'    {match.look} {match.score:g}: "{match.item[:60]}" in "{match.found[:80]}"'
            console.print(safe_line(words, "dim"), soft_wrap=True)


def show_adapters(console: Console, root: Path) -> None:
    """Where the adapters of a run are, and what to do with them."""
    for name, adapter in sorted(adapters_of(root).items()):
        console.print(safe_line(f"{name:<12} {adapter.folder or adapter.model}"), soft_wrap=True)
    words = f"How to serve them: docs/training.md. The run: culturepark show {shlex.quote(str(root))}"
    console.print(safe_line(words), style="dim", soft_wrap=True)


def outcome_words(outcome: Outcome) -> str:
    """How long a finished training lasted, and how far the loss fell."""
    words = f"done in {clock(outcome.seconds)}"
    if fall := outcome.fall:
        words += f", loss {fall[0]:g} -> {fall[1]:g}"
    if outcome.held_out_loss:
        before, after = outcome.held_out_loss
        words += f", on held-out questions {before:g} -> {after:g}"
    return words
