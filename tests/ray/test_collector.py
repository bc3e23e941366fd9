"""The collector dies alone and the run goes on for a while; what is lost is an answer of its."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.collector import Collector
from actors.run_context import RunContext
from tests.builders import run_in, settings
from tests.endpoint import ScriptedEndpoint
from tests.ray.calm import IN_FLIGHT, Calm
from tests.ray.conftest import alive, children_named, wait_for
from tests.torture import CALLERS, Kill, may_be_repeated

LONG = ("plan.utterances=10", "plan.dialogues_per_question=4")
"""Eight dialogues are spoken side by side, so that what the calls below are about is known."""


@pytest.fixture
def calm(tmp_path: Path) -> Iterator[Calm]:
    with ScriptedEndpoint().serving() as endpoint:
        yield Calm.made(tmp_path / "calm", endpoint, *LONG)


def test_turns_since_the_collectors_restart_are_not_paid_for_again(
    tmp_path: Path, generate: Any, calm: Calm
) -> None:
    """Its moderator lives on and does not begin again; what it is told is on disk, is."""
    out = tmp_path / "run"
    run = calm.start(generate, out)
    calm.go_on(run, 3 * IN_FLIGHT)
    killed = [Kill("ray::Collector", time.time(), 0.0)]
    (collector,) = children_named(run.process.pid, "ray::Collector")
    os.kill(collector, signal.SIGKILL)
    log = out / "logs" / "collector.jsonl"
    wait_for(lambda: log.read_text("utf-8").count('"opened"') == 2, "the collector, again")
    calm.go_on(run, 4 * IN_FLIGHT)  # half of each dialogue
    killed.append(Kill("driver", time.time(), 0.0))
    theirs = [pid for name in CALLERS for pid in children_named(run.process.pid, name)]
    run.kill()
    wait_for(lambda: not any(map(alive, theirs)), "the end of its callers")
    killed[-1].over_s = time.time()
    calm.resume(generate, out)
    calm.assert_same(out, may_be_repeated(calm.endpoint, killed, out / "logs"))


def test_the_answer_to_its_last_call_is_lost_and_it_is_called_again(tmp_path: Path) -> None:
    """Ray then tells of a failure, and the actor lives: the run is whole, and does not fail."""
    run = run_in(tmp_path / "run", settings())
    collector = Collector(RunContext.of(run, run.settings).packed(), ("here", "token"))
    for _ in range(2):
        asyncio.run(collector.finish())
    assert (run.root / "summary.json").is_file()
