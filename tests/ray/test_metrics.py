"""Metrics as Prometheus gets them, and `status` beside a real run."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from culturepark.monitor.metrics import METRICS, PREFIX
from tests.ray.conftest import wait_for

ROOT = Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A mock endpoint at which every fault happens."""
    port = free_port()
    command = [sys.executable, str(ROOT / "scripts" / "mock_endpoint.py"), "--port", str(port)]
    # A slow reply is one that comes too late.
    faults = ["--latency-s", "0.2", "--refused", "0.06", "--slow", "0.04", "--retry-after-s", "0.1"]
    server = subprocess.Popen([*command, *faults])
    wait_for(lambda: read(f"http://127.0.0.1:{port}/stats"), "the mock endpoint")
    yield f"http://127.0.0.1:{port}/v1"
    server.terminate()
    server.wait()


def read(url: str) -> str:
    """What is there; nothing while there is no answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.read().decode()
    except (urllib.error.URLError, OSError):
        return ""


def scraped(page: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Labels and value of each of our series, by name."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in page.splitlines():
        if match := re.fullmatch(rf"ray_{PREFIX}(\w+)\{{(.*)\}} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            found.setdefault(match[1], []).append((labels, float(match[3])))
    return found


def test_every_metric_can_be_scraped_while_the_run_goes_on(
    endpoint: str, tmp_path: Path, generate: Any
) -> None:
    out, port = tmp_path / "run", free_port()
    run = generate(
        out,
        'models.chat.engine="openai"',
        'models.chat.profile="full"',
        'models.chat.model="mock"',
        f'models.chat.base_urls=["{endpoint}"]',
        "models.chat.price_prompt=1",
        "models.chat.price_completion=2",
        'models.embedder.engine="scripted"',
        'plan.cultures=["arabic","korean"]',
        "plan.dialogues_per_question=64",
        "plan.utterances=4",
        "refine.cell_dialogues=4",
        "store.shard_dialogues=4",
        "limits.retries=1",
        "limits.backoff_s=0.1",
        "limits.deadline_s=1.5",
        "limits.adaptive=false",
        "limits.dialogues_in_flight=12",
        f"actors.metrics_port={port}",
    )
    pages: list[dict[str, list[tuple[dict[str, str], float]]]] = [{}]
    wanted = {f"{one.name}_count" if one.kind == "histogram" else one.name for one in METRICS}

    def all_there() -> bool:
        assert run.process.poll() is None, f"it ended without {wanted - set(pages[-1])}: {run.wait()}"
        pages.append(scraped(read(f"http://127.0.0.1:{port}/metrics")))
        return wanted <= set(pages[-1])

    wait_for(all_there, "every metric of the table", 60)
    page = pages[-1]
    status = [sys.executable, "-m", "culturepark", "status", str(out), "--json"]
    seen = json.loads(subprocess.run(status, capture_output=True, check=True).stdout)

    def value(name: str, **labels: str) -> float:
        (one,) = [v for have, v in page[name] if labels.items() <= have.items()]
        return one

    planned = seen["dialogues"]["planned"]
    assert seen["state"] == "running"
    assert seen["age_s"] < 10
    assert value("dialogues_planned") == planned
    assert 0 < value("dialogues_finished_total") <= seen["dialogues"]["finished"]
    assert 0 < value("dialogues_in_flight") <= 64
    assert 0 < value("turns_total") <= seen["turns"] <= 4 * planned
    prompt = value("tokens_total", role="speaker", kind="prompt")
    assert 0 < prompt <= seen["usage"]["speaker"]["prompt_tokens"]
    assert 0 < value("cost_so_far") <= seen["cost"]["so_far"]
    assert value("cost_to_come") > 0
    assert value("samples", culture="arabic") <= seen["cultures"]["arabic"]["kept"]
    assert {labels["endpoint"] for labels, _ in page["endpoint_limit"]} == {endpoint[7:-3]}
    assert 0.1 < value("endpoint_latency_seconds") < 3
    assert value("endpoint_in_flight") > 0
    assert value("poll_seconds_count") > 0
    for labels, _ in (series for name in page for series in page[name]):
        assert not any("http" in one or str(tmp_path) in one for one in labels.values())


def test_a_port_that_is_taken_is_said_before_the_run(tmp_path: Path, generate: Any) -> None:
    with socket.socket() as in_use:
        in_use.bind(("127.0.0.1", 0))
        in_use.listen()
        port = in_use.getsockname()[1]
        scripted = ['models.chat.engine="scripted"', 'models.embedder.engine="scripted"']
        code, printed = generate(tmp_path / "run", *scripted, f"actors.metrics_port={port}").wait(60)
    assert code == 2
    assert f"port {port} cannot be used" in " ".join(printed.split())
