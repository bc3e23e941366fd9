"""What all views share: consoles, tables, errors, and untrusted text made safe to print (sanitised).

What a model, a survey or an endpoint said is data: it goes to the terminal as `Text`, never as markup, and
without control characters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from culturepark.errors import CultureParkError, Interrupted
from culturepark.text import tidy

VERDICT_STYLES = {"entails": "green", "novel": "yellow", "contradicts": "red"}
_WIDEST = 100
"""Columns of the widest line: longer ones are hard to read."""


def stdout_console() -> Console:
    """The console for results."""
    console = Console(highlight=False)
    console.width = min(console.width, _WIDEST)
    return console


def stderr_console() -> Console:
    """The console for errors."""
    return Console(stderr=True, highlight=False)


def safe_text(text: str, style: str = "") -> Text:
    """Untrusted text, as it may be printed."""
    return Text(tidy(text), style)


def safe_line(text: str, style: str = "") -> Text:
    """Untrusted text on one line."""
    return Text(" ".join(tidy(text).split()), style)


def table(*columns: str, left: int = 1) -> Table:
    """A quiet table: the first `left` columns hold words, the others numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim", show_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place < left else "right", no_wrap=place == 0)
    return made


def key_values(rows: Iterable[tuple[str, Text | str]]) -> Table:
    """Two columns: names, and the value of each."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(name), value if isinstance(value, Text) else safe_text(value))
    return grid


def heading(console: Console, words: str) -> None:
    """A heading with some air above."""
    console.print()
    console.rule(Text(words, "bold"), align="left", style="dim")


def command(words: str) -> Text:
    """Something to type."""
    return Text(f"  {words}", "cyan")


def print_verdict(console: Console, subject: str, ok: bool, words: str, fix: str) -> None:
    """One line on whether `subject` works, and one on what to do next if it does not."""
    line = Text(f"{subject:<10}", "bold").append("ok    " if ok else "FAILS ", "green" if ok else "bold red")
    console.print(line.append_text(safe_line(words)), soft_wrap=True)
    if fix:
        console.print(Text(" " * 16).append_text(safe_line(fix, "cyan")), soft_wrap=True)


def print_error(error: CultureParkError) -> None:
    """Where, what, what next. Lines are not broken here, so that paths and commands stay whole."""
    style = "bold yellow" if isinstance(error, Interrupted) else "bold red"
    text = Text(type(error).__name__, style).append(": ", "default")
    text.append(_on_lines(error.where), "bold").append(": ").append(_on_lines(error.what))
    if error.fix:
        text.append("\n").append(_on_lines(error.fix), "cyan")
    _print_err(text)


def print_internal(error: BaseException) -> None:
    """An error that is our own fault, in one line."""
    what = " ".join(tidy(f"{type(error).__name__}: {error}").split())[:400]
    text = Text("Internal error", "bold red").append(f": {what}\n", "default")
    _print_err(text.append("Run again with --debug to see where it happened, and report it.", "cyan"))


def _print_err(text: Text) -> None:
    sys.stdout.flush()
    stderr_console().print(text, soft_wrap=True)


def _on_lines(text: str) -> str:
    return tidy(text)[:2000]
