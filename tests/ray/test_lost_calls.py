"""Ray's own calls are lost, answered into the void, carried out twice and late: the run stays the same.

Messages between actors do not go through Ray; `tests/unit/test_outbox.py` breaks their connections.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ray.calm import IN_FLIGHT, Calm

WAYS = ("req", "resp", "in_flight")
"""The request is lost, the answer is, or the caller is told of a failure while the call is carried out."""
STARTS = 5
UNDER_WAY = 20
"""Calls after which a run is surely more than looked at beforehand."""
CALLS_OF_ACTORS = "CoreWorkerService.grpc_client.PushTask"
PROBE = """
import ray
from actors.session import ray_session

class Answers:
    def answer(self):
        return 1

lost = 0
with ray_session():
    actor = ray.remote(Answers).options(max_restarts=-1, max_task_retries=0).remote()
    for _ in range(60):
        try:
            ray.get(actor.answer.remote(), timeout=30)
        except ray.exceptions.RayError:
            lost += 1
print(lost)
"""


def chances(percent: int, at_least: int = 0) -> dict[str, int]:
    """How many calls of a process fail, and which way, as Ray reads it."""
    often = {f"{way}_failure_prob": percent for way in WAYS}
    return {"num_failures": -1, **often, **{f"num_lower_bound_{way}_failures": at_least for way in WAYS}}


def under_way_at_deaths(out: Path) -> int:
    """Ray may declare an actor dead over a lost call; what was under way there is asked for again."""
    return IN_FLIGHT * (out / "logs" / "moderator.jsonl").read_text().count('"asked_again"')


def test_calls_of_actors_get_lost(
    tmp_path: Path, generate: Any, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process loses a call for certain, an answer, and both; more of them by chance. All are late."""
    monkeypatch.setenv("RAY_testing_rpc_failure", json.dumps({CALLS_OF_ACTORS: chances(5, at_least=1)}))
    late = "CoreWorkerService.grpc_server.PushTask=1000:300000"
    monkeypatch.setenv("RAY_testing_asio_delay_us", late)
    out = tmp_path / "run"
    run = calm.start(generate, out, latency_s=0.05)
    calm.end(run)
    calm.assert_same(out, repeated=under_way_at_deaths(out))
    # Which of the run's calls were hit is not told; that calls are hit at all, under this very setting, is.
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, timeout=120
    )
    assert int(probe.stdout) > 0, probe.stderr


def test_all_calls_within_ray_get_lost(
    tmp_path: Path, generate: Any, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own processes may not survive this while they start: then the same command is given again."""
    monkeypatch.setenv("RAY_testing_rpc_failure", json.dumps({"*": chances(3)}))
    out = tmp_path / "run"
    run = calm.start(generate, out, latency_s=0.05)
    for _ in range(STARTS):
        while run.process.poll() is None and calm.endpoint.served <= UNDER_WAY:
            time.sleep(0.05)
        if calm.endpoint.served > UNDER_WAY:
            break
        run = calm.start(generate, out, latency_s=0.05)
    calm.end(run)
    calm.assert_same(out, repeated=under_way_at_deaths(out))
