"""Runs on a real, private Ray with a scripted model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

SCRIPTED = [
    'models.chat.engine="scripted"',
    'models.chat.profile="full"',
    'models.embedder.engine="scripted"',
]


class Generate:
    """`culturepark generate` in a process of its own, as a user starts it."""

    def __init__(self, out: Path, *overrides: str, config: str = "") -> None:
        sets = [arg for one in overrides for arg in ("--set", one)]
        command = [sys.executable, "-m", "culturepark", "generate", *([config] if config else [])]
        self.process = subprocess.Popen(
            [*command, "--out", str(out), *sets],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"},
            start_new_session=True,
        )

    def wait(self, timeout_s: float = 180) -> tuple[int, str]:
        """Exit code and everything it printed."""
        try:
            out, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, out

    def kill(self) -> None:
        """kill -9, of the driver alone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def generate(tmp_path: Path) -> Iterator[Any]:
    """Start runs; none outlives the test."""
    started: list[Generate] = []

    def start(out: Path, *overrides: str, config: str = "") -> Generate:
        started.append(Generate(out, *overrides, config=config))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            run.kill()


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An undisturbed run (`tests.ray.calm`)."""
    from tests.endpoint import ScriptedEndpoint
    from tests.ray.calm import Calm

    with ScriptedEndpoint().serving() as endpoint:
        yield Calm.made(tmp_path_factory.mktemp("calm") / "run", endpoint)


def summary(out: Path) -> dict[str, Any]:
    """The run's summary."""
    return json.loads((out / "summary.json").read_text())


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    """All rows of a kind, by the manifest's word alone."""
    found: list[dict[str, Any]] = []
    for path in summary(out)["shards"][kind]:
        found += pq.read_table(out / path).to_pylist()
    return found


def wait_for(condition: Any, what: str, timeout_s: float = 90) -> None:
    """Wait until something outside this process has happened."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def children_named(pid: int, name: str) -> list[int]:
    """Processes below `pid` whose command line holds `name`."""
    below = {pid}
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    grew = True
    while grew:
        more = {child for child, parent in parents.items() if parent in below and child not in below}
        below |= more
        grew = bool(more)
    return [child for child in below if name in lines.get(child, "")]
