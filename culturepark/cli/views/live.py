"""The display of a run that goes on: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from culturepark.cli.views.status import cost_words, left_words, rate, seconds, tokens_words
from culturepark.cli.views.terminal import safe_line, table
from culturepark.monitor.figures import Figures, FigureTracker, Snapshot, total_of
from culturepark.monitor.status import host_and_port
from culturepark.store.rundir import Run
from culturepark.words import clock, count, plural

_LINE_EVERY_S = 5.0
"""Least seconds between two plain lines."""
_ROWS_AROUND_CULTURES = 13
"""Rows of the panel beside those of the cultures and the endpoints."""
_ENDPOINTS_SHOWN = 3
"""How many endpoints the panel shows before it says how many more there are."""


class Display:
    """Shows snapshots of a run; a context manager. `turns_before` were said in earlier sessions."""

    def __init__(
        self, console: Console, run: Run, turns_before: int, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._run = run
        self._watch = FigureTracker(run, turns_before)
        self._clock_s = clock_s
        self._live: Live | None = None
        self._last_line = ""
        self._last_line_s = float("-inf")
        self._printed_notes: set[str] = set()

    def __enter__(self) -> Display:
        words = "Starting the actors and the models ..."
        if self._console.is_terminal:
            self._live = Live(Text(words, "dim"), console=self._console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
            # A second Ctrl-C ends the process on the spot, which must not leave a hidden cursor behind.
            self._console.show_cursor(True)
        else:
            self._console.print(words)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Show one look at the run."""
        for note in snapshot.set_aside:
            if note not in self._printed_notes:
                self._printed_notes.add(note)
                self._console.print(safe_line(f"Set aside, from an earlier crash: {note}", "yellow"))
        figures = self._watch.figures(snapshot)
        if self._live is not None:
            self._live.update(self._panel(snapshot, figures), refresh=True)
            return
        line = self._line(snapshot, figures)
        now_s = self._clock_s()
        if line != self._last_line and now_s - self._last_line_s >= _LINE_EVERY_S:
            self._last_line, self._last_line_s = line, now_s
            self._console.print(f"{clock(snapshot.elapsed_s):>7}  {line}", soft_wrap=True)

    # --- on a terminal

    def _panel(self, snapshot: Snapshot, figures: Figures) -> Group:
        progress, total = snapshot.progress, total_of(snapshot.funnels)
        ended = total["finished"] + total["failed"]
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(progress.planned, ended, width=36)
        known = figures.left_s is not None and not snapshot.draining
        left = Text(left_words(figures.left_s or 0.0) if known else "", "dim")
        head.add_row(
            Text(clock(snapshot.elapsed_s)), bar, Text(f"{ended:,}/{progress.planned:,}", "bold"), left
        )

        dialogues = Text(f"{count(total['finished'])} finished", "green")
        dialogues.append(", ", "default")
        dialogues.append(f"{count(total['failed'])} failed", "bold red" if total["failed"] else "default")
        dialogues.append(f", {count(progress.in_flight)} in flight", "default")
        if progress.refining:
            dialogues.append(f" ({count(progress.refining)} being refined)", "dim")
        opinions = Text(f"{count(total['extracted'])} found, ")
        opinions.append(f"{count(total['kept'])} kept", "green").append(
            f", {count(total['rejected'])} rejected"
        )
        if total["waiting"]:
            opinions.append(f", {count(total['waiting'])} waiting", "dim")
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        facts.add_row("dialogues", dialogues)
        facts.add_row("turns", count(figures.turns))
        if self._run.settings.refine.enabled:
            facts.add_row("opinions", opinions)
        facts.add_row("tokens", f"{tokens_words(figures.tokens)}; cost {cost_words(figures.cost)}")
        facts.add_row("speed", _speed(figures))
        if snapshot.trainings:
            facts.add_row("tuning", safe_line(_trainings(snapshot).removeprefix("tuning: ")))
        if snapshot.endpoints:
            facts.add_row("endpoints", _endpoints(snapshot))

        parts = [Text(), head, Text(), facts, Text(), self._cultures(snapshot)]
        if snapshot.draining:
            wait = f"{self._run.settings.limits.drain_s:g}"
            words = f"Stopping: dialogues in flight get {wait} s to end. Ctrl-C again stops at once."
            parts += [Text(), Text(words, "yellow")]
        elif progress.stopped:
            parts += [Text(), safe_line(f"Stopping: {progress.stopped}.", "bold red")]
        return Group(*(Padding(part, (0, 1)) for part in parts))

    def _cultures(self, snapshot: Snapshot) -> Table:
        planned = self._run.plan.planned()
        refine = self._run.settings.refine.enabled
        made = table(
            "culture", "dialogues", "", *(("opinions", "kept", "rejected") if refine else ()), left=2
        )
        endpoints = min(len(snapshot.endpoints), _ENDPOINTS_SHOWN + 1)
        room = max(3, self._console.height - _ROWS_AROUND_CULTURES - endpoints)
        for culture in sorted(planned)[:room]:
            funnel = snapshot.funnels.get(culture, {})
            ended = funnel.get("finished", 0) + funnel.get("failed", 0)
            bar = ProgressBar(max(1, planned[culture]), ended, width=16)
            counts = (
                [count(funnel.get(key, 0)) for key in ("extracted", "kept", "rejected")] if refine else []
            )
            made.add_row(culture, bar, f"{ended:,}/{planned[culture]:,}", *counts)
        if len(planned) > room:
            made.add_row(Text(f"and {len(planned) - room} more", "dim"))
        return made

    # --- elsewhere

    def _line(self, snapshot: Snapshot, figures: Figures) -> str:
        progress, total = snapshot.progress, total_of(snapshot.funnels)
        ended = total["finished"] + total["failed"]
        parts = [
            f"{count(ended)} of {count(progress.planned)} dialogues ended"
            + (f" ({count(total['failed'])} failed)" if total["failed"] else ""),
            f"{count(progress.in_flight)} in flight",
            plural(figures.turns, "turn"),
        ]
        if self._run.settings.refine.enabled:
            parts.append(f"{plural(total['extracted'], 'opinion')}, {count(total['kept'])} kept")
        parts += [tokens_words(figures.tokens), f"cost {cost_words(figures.cost)}"]
        if figures.now.turns_s is not None:
            parts.append(_speed(figures))
        if snapshot.trainings:
            parts.append(_trainings(snapshot))
        if snapshot.draining or progress.stopped:
            parts.append(f"stopping: {safe_line(progress.stopped or 'on request')}")
        return "; ".join(parts)


def _trainings(snapshot: Snapshot) -> str:
    return "tuning: " + ", ".join(f"{name} {state}" for name, state in snapshot.trainings.items())


def _speed(figures: Figures) -> str:
    now = figures.now
    words = "" if now.turns_s is None else f"{rate(now.turns_s)} turns/s, {rate(now.tokens_s)} tokens/s"
    return ", ".join(part for part in (words, plural(figures.retries, "retry", "retries")) if part)


def _endpoints(snapshot: Snapshot) -> Table:
    made = Table.grid(padding=(0, 2))
    for one in snapshot.endpoints[:_ENDPOINTS_SHOWN]:
        made.add_row(
            safe_line(f"{one.model} at {host_and_port(one.url)}"),
            f"{count(one.in_flight)} of {count(one.limit)}",
            f"{rate(one.requests_s)}/s",
            seconds(one.latency_s),
        )
    if (more := len(snapshot.endpoints) - _ENDPOINTS_SHOWN) > 0:
        made.add_row(Text(f"and {more} more", "dim"))
    return made
