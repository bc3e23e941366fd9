"""What an evaluation found, on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from culturepark.cli.views.terminal import heading, safe_line, safe_text, table
from culturepark.evaluation.labelled import LabelledSet
from culturepark.evaluation.measure import Better, Comparison
from culturepark.evaluation.report import FLOORS, EvaluationReport, Figure
from culturepark.words import count, plural

_ARROWS: dict[Better, str] = {"lower": "↓", "higher": "↑", "near 1": "→1", "neither": ""}


def show_labelled(console: Console, sets: Sequence[LabelledSet]) -> None:
    """Each set's size, language, licence and notes, before its texts cost anything."""
    for one in sets:
        texts = f"{plural(len(one.rows), 'text')} in {one.task.language}"
        console.print(safe_line(f"{one.task.name}: {texts}. {one.task.licence}", "dim"))
        for note in one.notes:
            console.print(safe_line(f"  {note}", "yellow"))


@contextmanager
def progress_bar(console: Console, name: str, total: int) -> Generator[Callable[[], None]]:
    """A bar of `total` questions to the model `name`, gone after the block. Yields a call that adds one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(safe_line(name).plain, total=total)
        yield lambda: progress.advance(bar)


def show_report(console: Console, report: EvaluationReport) -> None:
    """A table of figures a model, one of differences if two were compared, and the cautions."""
    for model in dict.fromkeys(one.model for one in report.figures):
        heading(console, safe_line(model).plain)
        console.print(_figures_table([one for one in report.figures if one.model == model]))
    words = (
        "const, rand, maj, oth: what models reach that always say the same, anything, what most people of the"
    )
    console.print(
        Text(f"{words} culture say, what people elsewhere say; bad: answers that cannot be read", "dim")
    )
    for first, second in dict.fromkeys((one.first, one.second) for one in report.comparisons):
        heading(console, f"{second} against {first}")
        pair = [one for one in report.comparisons if (one.first, one.second) == (first, second)]
        console.print(_comparisons_table(pair))
    if report.comparisons:
        console.print(Text("p: two-sided, by bootstrap, corrected for their number (Holm)", "dim"))
    if report.notes:
        heading(console, "To be kept in mind")
        console.print(Group(*(safe_text(f"- {note}") for note in report.notes)))


def _figures_table(figures: Sequence[Figure]) -> Table:
    """Those that can be good or bad, and of the others those of all cultures; the files hold all."""
    made = table("figure", "value", "95 %", "const", "rand", "maj", "oth", "n", "bad")
    made.columns[0].no_wrap, made.columns[0].overflow = False, "fold"
    for column in made.columns[1:]:
        column.no_wrap, column.min_width = True, 3
    last = ""
    for one in figures:
        if one.better == "neither" and one.subset != "all":
            continue
        if one.task != last:
            made.add_row(safe_line(one.task, "bold"))
        last = one.task
        made.add_row(
            safe_line(_name(one.subset, one.metric, one.better)),
            Text(number(one.value), "bold"),
            _range(one.low, one.high),
            *(number(getattr(one, f"floor_{name}")) for name in FLOORS),
            count(one.n),
            f"{one.invalid_rate:.0%}",
        )
    return made


def _comparisons_table(comparisons: Sequence[Comparison]) -> Table:
    made = table("figure", "difference", "95 %", "p", "units", "")
    made.columns[2].no_wrap = True
    for one in comparisons:
        found = one.difference
        made.add_row(
            safe_line(f"{one.task} {_name(one.subset, one.metric, one.better)}"),
            number(found.value, signed=True) if found else "-",
            _range(found.low, found.high) if found else "-",
            number(one.p_holm),
            count(one.n_units),
            _verdict(one),
        )
    return made


def _verdict(one: Comparison) -> Text:
    if one.difference is None or one.p_holm is None or one.p_holm >= 0.05 or one.better == "near 1":
        return Text("")
    improved = (one.difference.value < 0) == (one.better == "lower")
    return Text("better", "green") if improved else Text("worse", "red")


def _name(subset: str, metric: str, better: Better) -> str:
    return f"{subset} {metric} {_ARROWS[better]}".rstrip()


def _range(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{number(low)} to {number(high)}"


def number(value: float | None, *, signed: bool = False) -> str:
    """Three digits that matter, no zero before the point; `-` where there is none."""
    if value is None:
        return "-"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    shown = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return shown.replace("0.", ".", 1) if abs(value) < 1 and shown.lstrip("+-").startswith("0.") else shown
