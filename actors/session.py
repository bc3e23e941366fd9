"""A Ray session: the cluster that a process was submitted to, or a private one for it alone."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from actors import METRICS_INTERVAL, METRICS_SELDOM
from actors.ray_patches import without_unused_processes
from culturepark import flock
from culturepark.errors import ConfigError, CultureParkError
from culturepark.settings import shown_address

_HOME_PREFIX, _OWNER = "culturepark-ray-", "owner.lock"
_BEING_MADE_S = 60.0
"""A directory without an owner that is younger than this, in seconds, may be one that another session just
made."""

_ATTEMPTS = 2
"""Attempts to start Ray, which gives its processes thirty seconds: on a slow disk that can be too short, and
the second time they are in memory."""
_TOO_LATE = "timed out during startup"
"""Part of what Ray says when its processes did not start in time."""

_METRICS_OFTEN_MS = "5000"
"""Milliseconds between Ray's reports of metrics when they are served."""


@contextmanager
def ray_session(metrics_port: int = 0) -> Iterator[None]:
    """The cluster this process was submitted to, or else a private one for this process alone.

    A private one listens on loopback, with token authentication, without a dashboard, in a
    temporary directory that only this user can enter and that is removed at the end. Its metrics can
    be read at `metrics_port`, unless that is 0. Raises ConfigError, CultureParkError.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        _join(address)
        try:
            yield
        finally:
            ray.shutdown()
        return
    options = _metrics_options(metrics_port) if metrics_port else {}
    home, owner = _private_home()
    try:
        _start(Path(home), options)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(home, ignore_errors=True)
        os.close(owner)


def _start(home: Path, options: dict[str, Any]) -> None:
    """Start Ray below `home`. Raises CultureParkError if it does not come up."""
    for attempt in range(1, _ATTEMPTS + 1):
        started: list[Any] = []
        try:
            with without_unused_processes(started):
                ray.init(
                    address="local",
                    _temp_dir=str(home / f"ray{attempt}"),  # Ray opens it to all; `home` stays closed
                    _node_ip_address="127.0.0.1",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=128 << 20,
                    **options,
                )
            return
        except Exception as error:  # Ray's own is no more than that
            ray.shutdown()
            for node in started:  # Ray forgets one that it did not finish
                node.kill_all_processes(check_alive=False, allow_graceful=False)
            if _TOO_LATE not in str(error):
                raise
    what = f"it did not come up on this machine, which was tried {_ATTEMPTS} times, half a minute each."
    fix = "The machine may be too busy, or short of memory: give the same command again when it is not."
    raise CultureParkError("Ray", what, fix)


def _join(address: str) -> None:
    """Become a driver on the cluster that RAY_ADDRESS names. Raises ConfigError."""
    try:
        if "://" in address:
            raise ValueError("it is the address of a job server")
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ValueError, RuntimeError, OSError) as error:
        ray.shutdown()
        what = f"no cluster can be joined at {shown_address(address)}: {str(error).splitlines()[0][:200]}."
        fix = "Submit the run with `ray job submit`, or unset RAY_ADDRESS to run on this machine alone."
        raise ConfigError("RAY_ADDRESS", what, fix) from None


def _metrics_options(port: int) -> dict[str, Any]:
    """Options that make Ray serve metrics at `port`, and collect them often. Raises ConfigError."""
    with socket.socket() as probe:
        # Ray's own agent would die of a port in use, without a word.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            what = f"port {port} cannot be used: {(error.strerror or str(error)).lower()}."
            fix = "Name a port that is free, or 0 for no metrics."
            raise ConfigError("$.actors.metrics_port", what, fix) from None
    if os.environ.get(METRICS_INTERVAL) == METRICS_SELDOM:  # not a user's own
        os.environ[METRICS_INTERVAL] = _METRICS_OFTEN_MS
    return {"_metrics_export_port": port}


def _private_home() -> tuple[str, int]:
    """A new temporary directory for one Ray session, and the open lock that says it is in use.

    Sessions whose process was killed leave theirs behind: those that are this user's, and that
    no process holds any more, are removed.
    """
    for lock in Path(tempfile.gettempdir()).glob(f"{_HOME_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError):
            if lock.stat().st_uid != os.getuid():
                continue
            with lock.open("rb") as file:
                if flock.try_acquire(file.fileno()):
                    shutil.rmtree(lock.parent, ignore_errors=True)
    # A dying Ray process may write to its directory once more after it was removed.
    for folder in Path(tempfile.gettempdir()).glob(f"{_HOME_PREFIX}*"):
        with contextlib.suppress(OSError):
            about = folder.stat()
            old = time.time() - about.st_mtime > _BEING_MADE_S
            if about.st_uid == os.getuid() and old and not (folder / _OWNER).exists():
                shutil.rmtree(folder, ignore_errors=True)
    home = tempfile.mkdtemp(prefix=_HOME_PREFIX)  # mode 0700; short, since sockets live below it
    owner = flock.open_file(Path(home, _OWNER), 0o600)
    flock.acquire(owner)
    return home, owner
