"""A read-only file system: a run on it is refused in words before anything starts, and still read."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from culturepark.errors import RunDirError
from culturepark.messages import encode
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from tests import builders, runs
from tests.faults import FaultyFiles

_READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


def in_a_world_where_it_is_read_only(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command for which `folder` is mounted read-only, as nothing else keeps root from writing."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    return subprocess.run(
        ["unshare", "--mount", *as_root, "sh", "-c", _READ_ONLY, str(folder), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
    )


def culturepark(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return in_a_world_where_it_is_read_only(folder, sys.executable, "-m", "culturepark", *arguments)


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A folder for `culturepark`; skips where no mount can be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        tried = in_a_world_where_it_is_read_only(folder, "sh", "-c", f'! touch "{folder}/file"')
    except FileNotFoundError:
        pytest.skip("this system has no `unshare`")
    if tried.returncode:
        pytest.skip("this user may mount nothing")
    return folder


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_is_refused_in_words(read_only: Path, begun: bool) -> None:
    out = read_only / "run"
    if begun:
        runs.made(out, ended=9)
    before = {path: path.stat().st_mtime_ns for path in read_only.rglob("*")}
    config = runs.config(read_only.parent)
    done = culturepark(read_only, "generate", str(config), "--out", str(out))
    printed = done.stdout + done.stderr
    assert done.returncode == 4, printed
    assert printed.count("RunDirError") == 1
    assert "read-only file system" in printed.lower()
    assert "another --out" in printed
    assert "Traceback" not in printed
    assert "Starting" not in printed
    assert {path: path.stat().st_mtime_ns for path in read_only.rglob("*")} == before


@pytest.mark.parametrize("command", ["show", "check", "status"])
def test_a_run_is_read(read_only: Path, command: str) -> None:
    runs.made(read_only / "run")
    done = culturepark(read_only, command, str(read_only / "run"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_system_that_becomes_read_only_stops_the_writer(tmp_path: Path) -> None:
    """As a kernel does it to a disk that fails. What was acknowledged stays."""
    run = builders.run_in(tmp_path / "run", runs.settings())
    first, second, *_ = builders.outcomes(run.plan)
    files = FaultyFiles(tmp_path)
    with RunLock.acquire(run.root) as lock:
        ledger = Ledger(run, lock, files)
        ledger.append(encode(first))
        ledger.sync()
        ledger.append(encode(second))
        for call in ("write", "fsync"):
            files.fail(call, errno.EROFS)
        with pytest.raises(RunDirError, match="read-only"):
            ledger.sync()
        with pytest.raises(RunDirError):
            ledger.sync()
    files.kill()
    with RunLock.acquire(run.root) as lock:
        assert Ledger(run, lock).has(first.number)
