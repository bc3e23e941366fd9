"""The CPU and memory of a command and all processes below it, and the counts of the mock endpoint."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

ROOT = Path(__file__).resolve().parent.parent
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / (1 << 20)
_SAMPLE_S = 0.1


class Sample(Struct, frozen=True):
    """The counts of the endpoint and the use of the processes at one moment."""

    time_s: float
    chats: int
    in_flight: int
    rss_mb: float
    cpu_s: float


class Measured(Struct, frozen=True):
    """One command, from its first model call to its end.

    `cpu_s` is that of the whole process tree from the first call until the last process is gone;
    `start_cpu_s` is what came before. `warm_cpu_s` is `cpu_s` without the first fifth of the calls, in which
    processes are still starting; `warm_calls` are the others. `steady_per_s` leaves out the first and the
    last fifth. `rss_mb` adds up the resident memory of all processes, shared pages counted in each.
    """

    calls: int
    cpu_s: float
    start_cpu_s: float
    start_s: float
    calling_s: float
    wall_s: float
    steady_per_s: float
    rss_mb: float
    max_in_flight: int
    request_bytes: int
    samples: tuple[Sample, ...]
    warm_cpu_s: float
    warm_calls: int

    @property
    def cpu_ms_per_call(self) -> float:
        """CPU milliseconds of the whole tree for one model call, once everything has started."""
        return 1000 * self.warm_cpu_s / self.warm_calls

    @property
    def calls_per_s(self) -> float:
        """Calls answered a second, from the first to the last."""
        return self.calls / self.calling_s


class Mock:
    """The mock endpoint, running."""

    def __init__(self, url: str) -> None:
        self.url = url

    def stats(self) -> dict[str, Any]:
        """Its counts."""
        with urllib.request.urlopen(f"{self.url}/stats", timeout=30) as reply:
            return msgspec.json.decode(reply.read())

    def rules(self, **rules: float) -> None:
        """Set its rules; the others are as by default."""
        urllib.request.urlopen(f"{self.url}/rules", msgspec.json.encode(rules), timeout=30).close()


@contextmanager
def mock_endpoint(*arguments: str) -> Iterator[Mock]:
    """A mock endpoint in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / "mock_endpoint.py"), "--port", "0", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        port = server.stdout.readline().rsplit(" ", 1)[-1].strip()
        yield Mock(f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait()


def measure(
    command: Sequence[str], mock: Mock, watch: Callable[[int], None] = lambda _: None, timeout_s: float = 1800
) -> Measured:
    """Run a command that calls the mock endpoint, to its end. `watch` is called with the
    process's id at each sample. Raises RuntimeError if it fails."""
    before = _children_cpu_s()
    first = mock.stats()
    began = time.monotonic()
    environment = os.environ | {"OPENAI_API_KEY": "none"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    samples: list[Sample] = []
    called_at = last_at = began
    start_cpu_s = 0.0
    meter = _Meter()
    try:
        while process.poll() is None:
            now, stats = time.monotonic(), mock.stats()
            if stats["requests"] == first["requests"]:
                called_at, start_cpu_s = now, meter.read(process.pid)
            chats = stats["chats"] - first["chats"]
            if not samples or chats > samples[-1].chats:
                last_at = now
            cpu_s = meter.read(process.pid)
            samples.append(Sample(now - began, chats, stats["now"], _tree_rss_mb(process.pid), cpu_s))
            watch(process.pid)
            if now - began > timeout_s:
                raise RuntimeError(f"not ended within {timeout_s:.0f} s: {' '.join(command)}")
            time.sleep(_SAMPLE_S)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        printed = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}\n{printed[-3000:]}")
    wall_s = time.monotonic() - began
    # What the kernel counted of waited-for processes is exact, but Ray does not wait for all of its own.
    cpu_s = max(meter.total_s(), _children_cpu_s() - before)
    stats = mock.stats()
    calls = stats["chats"] - first["chats"]
    warm = next(s for s in samples if s.chats >= 0.2 * calls)
    return Measured(
        calls=calls,
        cpu_s=cpu_s - start_cpu_s,
        start_cpu_s=start_cpu_s,
        start_s=called_at - began,
        calling_s=max(last_at - called_at, 1e-9),
        wall_s=wall_s,
        steady_per_s=_steady(samples, calls),
        rss_mb=max((s.rss_mb for s in samples), default=0.0),
        max_in_flight=max((s.in_flight for s in samples), default=0),
        request_bytes=(stats["prompt_bytes"] - first["prompt_bytes"]) // max(calls, 1),
        samples=tuple(samples),
        warm_cpu_s=cpu_s - warm.cpu_s,
        warm_calls=calls - warm.chats,
    )


def _steady(samples: Sequence[Sample], calls: int) -> float:
    inner = [s for s in samples if 0.2 * calls <= s.chats <= 0.8 * calls]
    if len(inner) < 2 or inner[-1].time_s == inner[0].time_s:
        return 0.0
    return (inner[-1].chats - inner[0].chats) / (inner[-1].time_s - inner[0].time_s)


class _Meter:
    """CPU of all processes that a tree has had; ended ones count with their last reading."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], float] = {}

    def read(self, pid: int) -> float:
        """Read the tree below `pid` now; returns CPU seconds so far."""
        for one in tree_of(pid):
            if fields := stat_of(one):
                self._known[one, fields[19]] = (int(fields[11]) + int(fields[12])) * _TICK_S
        return self.total_s()

    def total_s(self) -> float:
        """CPU seconds so far."""
        return sum(self._known.values())


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _parents() -> dict[int, int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and (fields := stat_of(int(path.name))):
            parents[int(path.name)] = int(fields[1])
    return parents


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def tree_of(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    found, todo = list[int](), [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def cpu_s_of(pid: int) -> float:
    """CPU seconds of one process."""
    fields = stat_of(pid)
    return (int(fields[11]) + int(fields[12])) * _TICK_S if fields else 0.0


def rss_mb_of(pid: int) -> float:
    """Resident memory of one process."""
    fields = stat_of(pid)
    return int(fields[21]) * _PAGE_MB if fields else 0.0


def _tree_rss_mb(pid: int) -> float:
    return sum(rss_mb_of(one) for one in tree_of(pid))
