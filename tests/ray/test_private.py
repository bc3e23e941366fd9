"""What a private Ray session shows to others: nothing but loopback, and a directory of one's own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.ray.conftest import SCRIPTED, children_named, wait_for


def listening(pids: list[int]) -> set[str]:
    """Local addresses that these processes listen on, in the kernel's own hexadecimal."""
    inodes: set[str] = set()
    for pid in pids:
        try:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                link = os.readlink(fd)
                if link.startswith("socket:["):
                    inodes.add(link[8:-1])
        except OSError:
            continue
    found: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].split(":")[0])
    return found


LOOPBACK = {
    "0100007F",  # 127.0.0.1
    "00000000000000000000000001000000",  # ::1
    "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
}


def test_all_sockets_are_on_loopback_and_the_directory_is_closed(tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    run = generate(out, *SCRIPTED, 'plan.cultures=["korean"]', 'models.chat.model="latency_ms=3000"')
    wait_for(lambda: any((out / "log").glob("*.wal")), "the run's log")
    addresses = listening(children_named(run.process.pid, ""))
    assert addresses
    assert addresses <= LOOPBACK
    owners = list(Path(tempfile.gettempdir()).glob("culturepark-ray-*/owner.lock"))
    homes = [lock.parent for lock in owners if lock.stat().st_uid == os.getuid()]
    assert homes
    assert all(stat.S_IMODE(home.stat().st_mode) == 0o700 for home in homes)
    os.killpg(run.process.pid, signal.SIGKILL)


JOIN = "import sys, ray; ray.init(address=sys.argv[1]); print(len(ray.nodes()), 'node')"


def test_a_session_waits_for_no_others_port_and_runs_nothing_needless(tmp_path: Path, generate: Any) -> None:
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # another process may have it already
            other.bind(("127.0.0.1", 52365))
            other.listen()
        run = generate(
            tmp_path / "run", *SCRIPTED, 'plan.cultures=["korean"]', "plan.dialogues_per_question=1"
        )
        wait_for(lambda: children_named(run.process.pid, "raylet/raylet"), "the raylet")
        (line,) = children_named(run.process.pid, "raylet/raylet")
        (logs,) = re.findall(r"--session_dir=(\S+?)\0", Path(f"/proc/{line}/cmdline").read_text())
        agent = Path(logs, "logs", "dashboard_agent.log")
        wait_for(lambda: agent.exists() and "raylet pid is" in agent.read_text(), "the node's agent")
        assert "Failed to bind" not in agent.read_text()
        for needless in ("dashboard/dashboard.py", "_private/monitor.py", "log_monitor.py"):
            assert not children_named(run.process.pid, needless)
        code, printed = run.wait()
        assert code == 0, printed


def test_no_process_joins_without_the_token(tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    run = generate(out, *SCRIPTED, 'plan.cultures=["korean"]', 'models.chat.model="latency_ms=3000"')
    wait_for(lambda: any((out / "log").glob("*.wal")), "the run's log")
    (line,) = [
        Path(f"/proc/{p}/cmdline").read_text() for p in children_named(run.process.pid, "raylet/raylet")
    ]
    head = re.findall(r"--gcs-address=(127\.0\.0\.1:\d+)", line)[0]

    def join(**as_whom: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", JOIN, head],
            env={**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **as_whom},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    ours = join(RAY_AUTH_MODE="token")  # from where this user's tokens are
    stranger = join(RAY_AUTH_MODE="disabled")
    assert "1 node" in ours.stdout
    assert stranger.returncode
    assert "1 node" not in stranger.stdout
    assert "authenticat" in stranger.stderr.lower()
    os.killpg(run.process.pid, signal.SIGKILL)


def test_an_actor_that_cannot_work_ends_the_run_in_words(tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    run = generate(out, *SCRIPTED, 'plan.cultures=["korean"]', 'models.chat.model="latency_ms=soon"')
    code, printed = run.wait(60)
    assert code == 2, printed
    assert "latency_ms" in printed
    assert "Traceback" not in printed


def test_an_outage_owes_everything(tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    down = 'models.chat.model="fail_every=1 fail_kind=connection"'
    code, printed = generate(out, *SCRIPTED, down).wait()
    assert code == 3, printed
    assert "owed" in printed
