"""A thousand dialogues at once against a mock endpoint over real HTTP: nothing lost, memory bounded."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray.conftest import children_named, rows, summary, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def endpoint() -> Iterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "mock_endpoint.py"), "--port", str(port)]
    server = subprocess.Popen([*command, "--latency-s", "1.0", "--dimensions", "64"])
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return bool(stats(url))
        except (urllib.error.URLError, ConnectionError):
            return False

    wait_for(answers, "the mock endpoint")
    yield url
    server.terminate()
    server.wait()


def stats(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/stats") as reply:
        return json.load(reply)


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def test_a_thousand_dialogues_at_once(endpoint: str, tmp_path: Path, generate: Any) -> None:
    out = tmp_path / "run"
    overrides = (
        'models.chat.engine="openai"',
        'models.chat.profile="full"',
        'models.chat.model="mock"',
        f'models.chat.base_urls=["{endpoint}/v1"]',
        'models.embedder.engine="openai"',
        'models.embedder.model="mock"',
        f'models.embedder.base_urls=["{endpoint}/v1"]',
        "plan.dialogues_per_question=160",
        "plan.utterances=4",
        "limits.dialogues_in_flight=1000",
        "limits.requests_in_flight=2000",
        "limits.adaptive=false",  # so that a thousand are in flight at once from the start
    )
    run = generate(out, *overrides)
    peak = {"ray::Moderator": 0.0, "ray::Collector": 0.0, "ray::RefinerActor": 0.0}

    def finished() -> bool:
        for name in peak:
            for pid in children_named(run.process.pid, name):
                peak[name] = max(peak[name], resident_mb(pid))
        return run.process.poll() is not None

    wait_for(finished, "the run", 400)
    code, printed = run.wait()
    assert code == 0, printed
    total = summary(out)
    assert total["complete"]
    assert not total["problems"]
    assert total["total"]["finished"] == 8 * 160
    assert len({row["id"] for row in rows(out, "dialogues")}) == 8 * 160
    assert stats(endpoint)["most_at_once"] >= 1000
    # About 100 MB each is Python with Ray; what is on top must not follow the number of dialogues.
    assert all(0 < mb < 400 for mb in peak.values()), peak
