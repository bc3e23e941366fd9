"""The driver of a run, from its start to its end: Ray, the actors, signals, progress."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.metrics import Metrics
from actors.run_actors import RunActors
from actors.session import ray_session
from actors.supervision import cause_of
from culturepark.dialogue.conductor import Progress
from culturepark.errors import CultureParkError, EndpointError, Interrupted
from culturepark.monitor.figures import Endpoint, FigureTracker, Snapshot, total_of
from culturepark.monitor.status import WRITE_EVERY_S, end_starting, starting, status_of, write_status
from culturepark.store.lock import RunLock
from culturepark.store.rundir import Run
from culturepark.training.jobs import trainable_names
from culturepark.training.subprocess_backend import kill_all

_POLL_S, _SLOW_POLL_S = 0.5, 1.0
"""Seconds between polls of a run's actors: at first, and later, since each poll costs them CPU time."""
_SLOW_AFTER_S = 30.0
"""Seconds after which a run is polled at the slower rate."""
_FINISH_S = 600.0
"""Seconds within which the collector has to finish a run that is over."""
_PREDECESSOR_S = 15.0
"""Seconds to wait for a predecessor that is just ending to release the lock of the run directory."""
_DOWN_S = 120.0
"""Seconds that the moderator or the collector may be down before the run is given up."""


def generate(run: Run, show: Callable[[Snapshot], None]) -> Snapshot:
    """Run until every planned dialogue has ended; returns where it stands then.

    `show` is called about once a second. Raises Interrupted after a first Ctrl-C once the run is
    drained and sealed, EndpointError if the models cannot go on, RunDirError if the disk cannot. A
    second Ctrl-C ends the process at once.
    """
    RunLock.acquire(run.root, _PREDECESSOR_S).release()  # refuse at once, not after Ray has started
    write_status(run.root, starting(run, time.time()))
    stop = _Signals(run.root)
    try:
        with ray_session(run.settings.actors.metrics_port):
            stop.install()  # Ray has put its own handler of SIGTERM in this one's place
            actors = RunActors(run)
            try:
                actors.engines.wait(stop.asked)
                if stop.asked.is_set():
                    what = "stopped on request before anything was begun."
                    raise Interrupted(str(run.root), what, "Run the same command again to go on.")
                return _drive(run, actors, show, stop)
            finally:
                actors.close()
    finally:
        end_starting(run.root)
        stop.restore()


def _drive(run: Run, actors: RunActors, show: Callable[[Snapshot], None], stop: _Signals) -> Snapshot:
    started = answered = time.monotonic()
    draining = False
    snapshot: Snapshot | None = None
    report: _Report | None = None
    while True:
        if stop.asked.is_set() and not draining:
            draining = _ask(actors.moderator.drain, "drain", "stopped on request") is not _DOWN
        asked = time.monotonic()
        moderator, collector = _ask(actors.moderator.status), _ask(actors.collector.status)
        if actors.raylet.lost():
            what = (
                "its process on this node has died, and the run's actors with it. What was done is on disk."
            )
            fix = (
                "Give the same command again and the run goes on; start Ray here first if this was a cluster."
            )
            raise CultureParkError("Ray", what, fix)
        actors.engines.check()
        if moderator is _DOWN or collector is _DOWN:
            if time.monotonic() - answered > _DOWN_S:
                what = f"the moderator or the collector has not come back for {_DOWN_S:.0f} s."
                raise CultureParkError("actors", what, "See the run's logs/, then run the command again.")
            time.sleep(_POLL_S)  # Ray is restarting it
            continue
        answered = time.monotonic()
        snapshot = Snapshot(
            progress=_progress(moderator["progress"]),
            funnels=collector["funnels"],
            underway=collector["underway"],
            set_aside=tuple(collector["set_aside"]),
            replayed=collector["replayed"],
            elapsed_s=time.monotonic() - started,
            draining=draining,
            endpoints=tuple(msgspec.convert(one, Endpoint) for one in moderator["endpoints"]),
        )
        report = report or _Report(run, snapshot)
        report.observe(snapshot, answered - asked)
        show(snapshot)
        for failure in (collector["failure"], moderator["failure"]):
            if failure is not None:
                raise failure
        if moderator["idle"]:
            break
        time.sleep(_POLL_S if answered - started < _SLOW_AFTER_S else _SLOW_POLL_S)
    _until_answered(actors.collector.finish)
    final = _until_answered(actors.collector.status)
    snapshot.funnels = final["funnels"]
    report.observe(snapshot, last=True)
    show(snapshot)
    _raise_if_stopped(run, snapshot.progress)
    if actors.trainer is not None:
        _wait_for_trainings(run, actors.trainer, snapshot, show, stop, started)
    return snapshot


def _wait_for_trainings(
    run: Run,
    trainer: Any,
    snapshot: Snapshot,
    show: Callable[[Snapshot], None],
    stop: _Signals,
    started: float,
) -> None:
    """Wait for all trainings of a run that is over. Asks for all again, as the trainer may have died."""
    names = trainable_names(snapshot.funnels, run.plan.planned())
    while True:
        _ask(trainer.train, names)
        states = _ask(trainer.status)
        if states is not _DOWN:
            snapshot.trainings, snapshot.elapsed_s = states, time.monotonic() - started
            show(snapshot)
            if names == [name for name in names if states.get(name) not in (None, "waiting", "running")]:
                break
        if stop.asked.is_set():
            what = "stopped on request while models were tuned; the data is complete."
            raise Interrupted(str(run.root), what, "Run the same command again to go on.")
        time.sleep(_POLL_S)
    failed: dict[str, CultureParkError] = _ask(trainer.errors)
    for name in names:
        if failed is not _DOWN and name in failed:
            raise failed[name]


def _raise_if_stopped(run: Run, progress: Progress) -> None:
    if not progress.stopped:
        return
    again = f"Run the same command again to go on: {progress.planned - progress.ended} dialogues are owed."
    if progress.stopped_by == "budget":
        fix = f"Raise it to go on, and {again[0].lower()}{again[1:]}"
        raise Interrupted("[budget]", f"{progress.stopped}.", fix)
    if progress.stopped_by == "drain":
        raise Interrupted(str(run.root), "stopped on request; what was done is on disk.", again)
    what = f"the run was stopped: {progress.stopped}."
    raise EndpointError(f"[{progress.stopped_by}]", what, f"Try `culturepark doctor`. {again}")


class _Report:
    """Writes the status file and updates Ray's metrics, every so many seconds."""

    def __init__(self, run: Run, first: Snapshot) -> None:
        self._run = run
        # Next to nothing has ended since the moderator's first answer, which began the session.
        self._watch = FigureTracker(run, total_of(first.funnels)["turns"])
        # Ray serves metrics in any case; in a private session at an unknown port unless one is set.
        known = run.settings.actors.metrics_port or os.environ.get("RAY_ADDRESS")
        self._metrics = Metrics() if known else None
        self._due_s = 0.0

    def observe(self, snapshot: Snapshot, answered_in_s: float | None = None, last: bool = False) -> None:
        """Add a snapshot to the figures; `answered_in_s` is how long the actors needed to answer for it."""
        figures = self._watch.figures(snapshot)
        if self._metrics and answered_in_s is not None:
            self._metrics.polled(answered_in_s)
        if snapshot.elapsed_s < self._due_s and not last:
            return
        self._due_s = snapshot.elapsed_s + WRITE_EVERY_S
        status = status_of(self._run, snapshot, figures, time.time())
        write_status(self._run.root, status)
        if self._metrics:
            self._metrics.report(status)


_DOWN = object()


def _until_answered(method: Any) -> Any:
    """The collector's answer, also if it dies meanwhile: what it does at the end is idempotent."""
    started = time.monotonic()
    while (answer := _ask(method, timeout_s=_FINISH_S)) is _DOWN:
        if time.monotonic() - started > _FINISH_S:
            what = f"the collector could not finish the run within {_FINISH_S:.0f} s."
            raise CultureParkError("actors", what, "See the run's logs/, then run the command again.")
        time.sleep(_POLL_S)
    return answer


def _ask(method: Any, *args: Any, timeout_s: float = 30) -> Any:
    """An actor's answer, or `_DOWN` while it is being restarted."""
    try:
        return ray.get(method.remote(*args), timeout=timeout_s)
    except RayTaskError as error:
        raise cause_of(error) from None
    except (RayActorError, GetTimeoutError):
        return _DOWN


def _progress(fields: dict[str, Any]) -> Progress:
    return Progress(**fields)


class _Signals:
    """Ctrl-C and SIGTERM: the first asks to drain, the second ends the process."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.asked = threading.Event()
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in self._before:
            signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back what handled these signals before, unless the process was asked to end: until it has,
        one more means to end it at once, and not to interrupt it while it tells how it ended."""
        for number, handler in self._before.items():
            signal.signal(number, _leave if self.asked.is_set() else handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.asked.is_set():
            with contextlib.suppress(Exception):
                kill_all(self._root)
            os._exit(130)  # Ray's processes end with this one
        self.asked.set()


def _leave(number: int, frame: object) -> None:
    os._exit(130)
