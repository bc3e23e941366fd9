"""Where a run stands, on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from culturepark.cli.views.run import funnel_table
from culturepark.cli.views.terminal import key_values, safe_line, table
from culturepark.monitor.figures import WINDOW_S, Cost, Dialogues, Endpoint, Speed, Tokens
from culturepark.monitor.status import State, StatusReport, host_and_port
from culturepark.words import clock, count, money, plural

_OLD_S = 10.0
"""Seconds after which a running run's status counts as old, and its age is marked."""

_WORDS: dict[State, tuple[str, str]] = {
    "running": ("running", "bold green"),
    "complete": ("complete: every planned dialogue has ended", "bold green"),
    "stopped": ("stopped; the command that began it goes on with what is owed", "bold yellow"),
    "died": ("it died without closing; the command that began it goes on with what is owed", "bold red"),
}


def status_view(root: Path, report: StatusReport, refine: bool) -> RenderableType:
    """The report for a terminal. `refine`: whether the run makes samples at all."""
    status, now = report.status, report.state == "running"
    words, style = _WORDS[report.state]
    if now and status.starting:
        words = "starting"
    elif now and status.stopping:
        words = f"running, and stopping: {status.stopping}"
    head = safe_line(str(root), "bold").append(": ").append_text(safe_line(words, style))
    if report.age_s is not None:
        late = report.age_s > _OLD_S
        old = f"as of {report.age_s:.0f} s ago"
        head.append(f" ({old})", "bold yellow" if late else "dim")
    rows = [
        ("dialogues", _dialogues(status.dialogues, now)),
        ("turns", f"{count(status.turns)} of {count(status.turns_planned)}" if status.turns_planned else ""),
        ("tokens", tokens_words(status.tokens)),
        ("speed", speed_words(status.speed, status.overall)),
        ("cost", cost_words(status.cost)),
        ("retries", "unknown" if status.retries is None else count(status.retries)),
        ("time", time_words(status.elapsed_s, status.left_s if now else None)),
    ]
    parts: list[RenderableType] = [head, Text(), key_values((name, value) for name, value in rows if value)]
    if status.endpoints:
        parts += [Text(), _endpoints(status.endpoints)]
    if status.cultures and refine:
        parts += [Text(), funnel_table(status.cultures)]
    return Group(*parts)


def _dialogues(seen: Dialogues, now: bool) -> Text:
    text = Text(f"{count(seen.finished)} finished", "green")
    text.append(", ", "default").append(
        f"{count(seen.failed)} failed", "bold red" if seen.failed else "default"
    )
    text.append(f", {count(seen.owed)} owed of {count(seen.planned)}", "default")
    if now and seen.in_flight:
        text.append(f"; {count(seen.in_flight)} in flight", "default")
        if seen.refining:
            text.append(f" ({count(seen.refining)} being refined)", "dim")
    return text


def tokens_words(tokens: Tokens) -> str:
    """Tokens read and written, or `unknown`."""
    if tokens.unknown:
        return "unknown"
    cached = f" ({count(tokens.cached)} from the cache)" if tokens.cached else ""
    words = f"{count(tokens.prompt)} read{cached}, {count(tokens.completion)} written"
    return f"{words}; {plural(tokens.unreported, 'call')} unreported" if tokens.unreported else words


def speed_words(now: Speed, overall: Speed) -> str:
    """Rates of now and of the session."""
    parts = [
        f"{rate(speed.turns_s)} turns/s, {rate(speed.tokens_s)} tokens/s {when}"
        for speed, when in ((now, f"in the last {WINDOW_S:.0f} s"), (overall, "over the session"))
        if speed.turns_s is not None
    ]
    return "; ".join(parts)


def rate(per_s: float | None) -> str:
    """A rate: `0.4`, `27.1`, `1,204`."""
    if per_s is None:
        return "unknown"
    return count(per_s) if per_s >= 100 else f"{per_s:.1f}"


def cost_words(cost: Cost) -> str:
    """Money so far, and to come unless nothing is."""
    if cost.local or cost.so_far is None:
        return money(cost.so_far, cost.local)
    so_far = f"at least {money(cost.so_far)}" if cost.unreported else money(cost.so_far)
    if cost.to_come == 0:
        return so_far
    to_come = "unknown" if cost.to_come is None else f"about {money(cost.to_come)}"
    return f"{so_far} so far, {to_come} to come"


def time_words(elapsed_s: float | None, left_s: float | None) -> str:
    """How long so far, and a guess at how much longer."""
    if elapsed_s is None:
        return ""
    left = "" if left_s is None else f", {left_words(left_s)}"
    return f"{clock(elapsed_s)} elapsed{left}"


def left_words(left_s: float) -> str:
    """A guess at the time left."""
    return f"about {clock(left_s)} left" if left_s >= 1 else "ending"


def seconds(latency_s: float) -> str:
    """A latency: `350 ms`, `2.4 s`; a dash where there was none."""
    if not latency_s:
        return "-"
    return f"{latency_s * 1000:.0f} ms" if latency_s < 1 else f"{latency_s:.1f} s"


def _endpoints(endpoints: tuple[Endpoint, ...]) -> RenderableType:
    names = ("endpoint", "model", "limit", "sent", "held", "calls/s", "latency", "429s", "faults", "weight")
    made = table(*names, left=2)
    for one in endpoints:
        made.add_row(
            safe_line(host_and_port(one.url)),
            safe_line(one.model),
            count(one.limit),
            count(one.in_flight),
            count(one.waiting),
            rate(one.requests_s),
            seconds(one.latency_s),
            count(one.refused),
            count(one.broken),
            f"{one.weight:g}",
        )
    return made
