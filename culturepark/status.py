"""Where a run stands, read from its directory: while it goes on, after it ended, after it died.

A running driver writes `status.json` every two seconds: a view and never truth. What has ended is known
from log and manifest, and whether anybody writes from the run's lock.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct
from rich.console import Group, RenderableType
from rich.text import Text

from culturepark.browse import View, being_written
from culturepark.estimate import turns_planned
from culturepark.settings import shown_address
from culturepark.show import funnel_table
from culturepark.store import funnel as funnels
from culturepark.store.rundir import Run, load_run
from culturepark.terminal import clock, count, facts, line_of, money, plural, table
from culturepark.watching import (
    WINDOW_S,
    Cost,
    Dialogues,
    Endpoint,
    Figures,
    Snapshot,
    Speed,
    Tokens,
    cost_of,
    dialogues_of,
    tokens_of,
    total_of,
)

STATUS_FILE = "status.json"
EVERY_S = 2.0
"""How often a driver writes it."""
_STARTING_S = 120.0
"""A start may take so long until somebody holds the run's lock."""
_OLD_S = 10.0
"""An older view is not shown as if it were of now."""

State = Literal["running", "complete", "stopped", "died"]


class Status(Struct, frozen=True, kw_only=True):
    """One view of a run: what `status.json` holds and `culturepark status --json` prints.

    Counts are of the whole run, `elapsed_s`, `speed`, `overall`, `retries` and `endpoints` of the
    latest session. `written_s` is Unix time. None means unknown.
    """

    run_id: str
    written_s: float
    starting: bool = False
    elapsed_s: float | None = None
    left_s: float | None = None
    dialogues: Dialogues
    turns: int = 0
    turns_planned: int = 0
    speed: Speed = Speed()
    overall: Speed = Speed()
    tokens: Tokens = Tokens()
    cost: Cost = Cost()
    retries: int | None = None
    stopping: str = ""
    endpoints: tuple[Endpoint, ...] = ()
    usage: dict[str, Any] = {}
    funnel: dict[str, Any] = {}
    cultures: dict[str, dict[str, Any]] = {}


class Report(Struct, frozen=True):
    """A status, whether the run goes on, and how old the view of it is; None if it is of this moment."""

    state: State
    age_s: float | None
    status: Status


def status_of(run: Run, snapshot: Snapshot, figures: Figures, now_s: float) -> Status:
    """The status that a running driver writes; `now_s` is Unix time."""
    stopping = "on request" if snapshot.draining else snapshot.progress.stopped
    return Status(
        written_s=now_s,
        elapsed_s=snapshot.elapsed_s,
        left_s=figures.left_s,
        dialogues=figures.dialogues,
        turns=figures.turns,
        speed=figures.now,
        overall=figures.overall,
        tokens=figures.tokens,
        cost=figures.cost,
        retries=figures.retries,
        stopping=stopping,
        endpoints=snapshot.endpoints,
        **_counted(run, snapshot.funnels),
    )


def starting(run: Run, now_s: float) -> Status:
    """The status of a run whose actors do not answer yet."""
    dialogues = Dialogues(planned=len(run.plan), owed=len(run.plan))
    return Status(run_id=run.file.run_id, written_s=now_s, starting=True, dialogues=dialogues)


def _counted(run: Run, by_culture: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What counts alone tell, as fields of a Status."""
    total, planned = total_of(by_culture), run.plan.planned()
    return {
        "run_id": run.file.run_id,
        "turns_planned": turns_planned(run.plan),
        "usage": funnels.usage_view(total, run.settings),
        "funnel": funnels.view(total, len(run.plan)),
        "cultures": {c: funnels.view(f, planned[c]) for c, f in sorted(by_culture.items())},
    }


# --- the file


def write_status(root: Path, status: Status) -> None:
    """Put a status in place of the one before. What the disk refuses is left: this is only a view."""
    part = root / f".{STATUS_FILE}.part"  # the lock leaves one writer
    with contextlib.suppress(OSError):
        part.write_bytes(msgspec.json.encode(status))
        part.replace(root / STATUS_FILE)


def end_starting(root: Path) -> None:
    """Take back that a run is starting, if it never came further."""
    last = read_status(root)
    if last is not None and last.starting:
        with contextlib.suppress(OSError):
            (root / STATUS_FILE).unlink()


def read_status(root: Path) -> Status | None:
    """The status that was written last; None if there is none that can be read."""
    try:
        return msgspec.json.decode((root / STATUS_FILE).read_bytes(), type=Status)
    except (OSError, msgspec.MsgspecError):
        return None


def look(root: Path, now_s: float) -> Report:
    """Where the run in this directory stands; `now_s` is Unix time.

    Raises RunDirError if there is no run, or a damaged one.
    """
    run = load_run(root)
    last = read_status(root)
    if last is not None and last.run_id != run.file.run_id:
        last = None
    writing = being_written(root)
    age_s = None if last is None else max(0.0, now_s - last.written_s)
    if age_s is not None and last is not None:
        if writing and not last.starting:
            return Report("running", age_s, last)
        if last.starting and age_s < _STARTING_S:
            return Report("running", age_s, _from_disk(View(root), last, now_s))
    view = View(root)
    status = _from_disk(view, last, now_s)
    if writing:
        return Report("running", None, status)
    if view.complete:
        return Report("complete", None, status)
    return Report("stopped" if _was_closed(view) else "died", None, status)


def _from_disk(view: View, last: Status | None, now_s: float) -> Status:
    """What the directory tells, with what the last session said of itself."""
    total = view.total
    dialogues = dialogues_of(total, len(view.plan))
    return Status(
        written_s=now_s,
        starting=last.starting if last else False,
        elapsed_s=last.elapsed_s if last else None,
        dialogues=dialogues,
        turns=total["turns"],
        overall=last.overall if last else Speed(),
        tokens=tokens_of(total),
        cost=cost_of(total, view.run.settings, dialogues.owed),
        retries=last.retries if last else None,
        stopping=last.stopping if last else "",
        **_counted(view.run, view.funnels),
    )


def _was_closed(view: View) -> bool:
    """Whether the last session sealed and published what it had: only one that died does not."""
    try:
        summary: Any = json.loads((view.root / "summary.json").read_bytes())
        return summary["total"] == funnels.view(view.total, len(view.plan))
    except (OSError, ValueError, KeyError, TypeError):
        return False


# --- for readers


def as_json_text(report: Report) -> str:
    """The report as one JSON object on one line."""
    fields: dict[str, Any] = {"state": report.state, "age_s": report.age_s}
    return msgspec.json.encode(fields | msgspec.to_builtins(report.status)).decode()


_WORDS: dict[State, tuple[str, str]] = {
    "running": ("running", "bold green"),
    "complete": ("complete: every planned dialogue has ended", "bold green"),
    "stopped": ("stopped; the command that began it goes on with what is owed", "bold yellow"),
    "died": ("it died without closing; the command that began it goes on with what is owed", "bold red"),
}


def shown(root: Path, report: Report, refine: bool) -> RenderableType:
    """The report for a terminal. `refine`: whether the run makes samples at all."""
    status, now = report.status, report.state == "running"
    words, style = _WORDS[report.state]
    if now and status.starting:
        words = "starting"
    elif now and status.stopping:
        words = f"running, and stopping: {status.stopping}"
    head = line_of(str(root), "bold").append(": ").append_text(line_of(words, style))
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
    parts: list[RenderableType] = [head, Text(), facts((name, value) for name, value in rows if value)]
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
    """Tokens read and written; unknown ones are said to be."""
    if tokens.unknown:
        return "unknown"
    cached = f" ({count(tokens.cached)} from the cache)" if tokens.cached else ""
    words = f"{count(tokens.prompt)} read{cached}, {count(tokens.completion)} written"
    return f"{words}; {plural(tokens.unreported, 'call')} told none" if tokens.unreported else words


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
    so_far = f"at least {money(cost.so_far)}" if cost.untold else money(cost.so_far)
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


def place(url: str) -> str:
    """What tells a replica from others: its host and port."""
    return shown_address(url).split("://", 1)[-1].split("/", 1)[0]


def _endpoints(endpoints: tuple[Endpoint, ...]) -> RenderableType:
    names = ("endpoint", "model", "limit", "sent", "held", "calls/s", "latency", "429s", "faults", "weight")
    made = table(*names, left=2)
    for one in endpoints:
        made.add_row(
            line_of(place(one.url)),
            line_of(one.model),
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
