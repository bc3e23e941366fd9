"""Where a run stands, read from its directory: while it goes on, after it ended, after it died.

A running driver writes `status.json` every two seconds. It is only a view: which dialogues have ended is
known from the write-ahead log and the manifest, and whether a process writes from the run's lock (lease).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from culturepark.errors import RunDirError
from culturepark.monitor.figures import (
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
from culturepark.preflight.estimate import turns_planned
from culturepark.settings import shown_address
from culturepark.store import funnel as funnels
from culturepark.store.files import REAL, Files, write_view
from culturepark.store.lock import being_written
from culturepark.store.rundir import Run, load_run
from culturepark.store.view import View

STATUS_FILE = "status.json"
WRITE_EVERY_S = 2.0
"""Seconds between two writes of `status.json` by a running driver."""
_STARTING_S = 120.0
"""Seconds for which a run that holds no lock yet is believed to be starting."""

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


class StatusReport(Struct, frozen=True):
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


def write_status(root: Path, status: Status, files: Files = REAL) -> None:
    """Replace the status file. An error of the disk is ignored, as the file is only a view.

    It is not durable: after a power loss there may be none, or one that `read_status` refuses.
    """
    with contextlib.suppress(RunDirError, FileExistsError):
        write_view(root / STATUS_FILE, msgspec.json.encode(status), files)


def end_starting(root: Path, files: Files = REAL) -> None:
    """Remove the status of a run that is starting, if it never came further."""
    last = read_status(root)
    if last is not None and last.starting:
        with contextlib.suppress(OSError):
            files.remove(root / STATUS_FILE)


def read_status(root: Path) -> Status | None:
    """The status that was written last; None if there is none that can be read."""
    try:
        return msgspec.json.decode((root / STATUS_FILE).read_bytes(), type=Status)
    except (OSError, msgspec.MsgspecError):
        return None


def status_report(root: Path, now_s: float) -> StatusReport:
    """Where the run in this directory stands; `now_s` is Unix time.

    Raises RunDirError if there is no run, or a damaged one.
    """
    run = load_run(root)
    last = read_status(root)
    if last is not None and last.run_id != run.file.run_id:
        last = None
    writing = being_written(root)
    age_s = None if last is None else max(0.0, now_s - last.written_s)
    if writing and last is not None and not last.starting:
        return StatusReport("running", age_s, last)
    starts = last is not None and last.starting and age_s is not None and age_s < _STARTING_S
    view = View(root)
    state = state_of(writing or starts, view.complete, _was_closed(view))
    return StatusReport(state, age_s if starts else None, _from_disk(view, last, now_s))


def state_of(active: bool, complete: bool, closed: bool) -> State:
    """The state of a run by whether a process works on it or starts to, whether every planned dialogue has
    ended, and whether the last session sealed and published before it ended."""
    if active:
        return "running"
    if complete:
        return "complete"
    return "stopped" if closed else "died"


def _from_disk(view: View, last: Status | None, now_s: float) -> Status:
    """A status by what is on disk, with the figures that the last session wrote of itself."""
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
    """Whether the last session sealed and published before it ended; one that died did not."""
    try:
        summary: Any = json.loads((view.root / "summary.json").read_bytes())
        return summary["total"] == funnels.view(view.total, len(view.plan))
    except (OSError, ValueError, KeyError, TypeError):
        return False


# --- for readers


def as_json_text(report: StatusReport) -> str:
    """The report as one JSON object on one line."""
    fields: dict[str, Any] = {"state": report.state, "age_s": report.age_s}
    return msgspec.json.encode(fields | msgspec.to_builtins(report.status)).decode()


def host_and_port(url: str) -> str:
    """The host and port of an address, which tell one replica from another."""
    return shown_address(url).split("://", 1)[-1].split("/", 1)[0]
