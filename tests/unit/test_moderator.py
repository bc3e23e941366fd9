"""The moderator without Ray: a fault of our own ends the run, and leaves what came before it."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.base import MessagingActor
from actors.moderator import EVENTS_FILE, Moderator, remove_events, write_events
from culturepark.dialogue.conductor import Conductor
from culturepark.dialogue.slots import COLLECTOR, REFINERS, Post
from culturepark.messages import Spoke, Turn, encode, pack
from culturepark.store.rundir import open_run
from tests import builders

TERM = 77
SECRET = "my grandmother's secret"


class _Moderator(Moderator):
    """A moderator of ten dialogues, all of whose posts are kept."""

    def __init__(self, root: Path) -> None:
        MessagingActor.__init__(self, ("namespace", "token"))
        of = builders.settings(
            plan={"cultures": ["arabic"], "questions": ["wvs7-q28"], "dialogues_per_question": 10},
            limits={"dialogues_in_flight": 3},
        )
        plan = builders.plan(of)
        replicas = dict.fromkeys([*plan.agent_cultures(), REFINERS], 1)
        self.conductor = self._conductor = Conductor(plan, of, bytes(2), TERM, replicas)
        self._context: Any = SimpleNamespace(root=str(root), settings=of)
        self._log: Any = SimpleNamespace(error=lambda *_, **fields: self.logged.append(fields))
        self._limits: Any = SimpleNamespace(view=list[Any])
        self._starting = asyncio.Lock()
        self._draining_since = self._halted_since = None
        self._validate_at = 0.0
        self.logged: list[dict[str, Any]] = []
        self.posted: list[Post] = []
        self._send(self.conductor.fill(1.0))

    def _send(self, posts: list[Post]) -> None:
        self.posted += posts


def events(root: Path) -> list[dict[str, Any]]:
    lines = (root / "logs" / EVENTS_FILE).read_bytes().splitlines()
    return [json.loads(line) for line in lines]


async def test_an_error_of_the_conductor_ends_the_run_and_leaves_its_last_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moderator = _Moderator(tmp_path)
    moderator.receive(pack([encode(Spoke(0, TERM, Turn(1, 0, SECRET)))]))
    assert moderator.posted[-1].address == COLLECTOR
    assert not (tmp_path / "logs").exists()

    def fault(*_: object) -> None:
        raise KeyError(SECRET)

    monkeypatch.setattr("culturepark.dialogue.conductor.step", fault)
    moderator._acknowledged(0, [encode(moderator.posted[-1].message)])
    status = await moderator.status()
    assert isinstance(status["failure"], KeyError)
    assert status["progress"]["stopped_by"] == "internal"
    head, filled, spoke, stored, stop = events(tmp_path)
    assert (head["error"], head["broken"]) == ("KeyError", "")
    assert [where.rpartition(" ")[2] for where in head["where"]][-2:] == ["_advance", "fault"]
    assert (filled["event"], len(filled["posts"])) == ("fill", 3)
    assert spoke["posts"] == [{"address": COLLECTOR, "kind": "Spoke", "number": 0, "turn": 1}]
    assert (stored["event"], stored["number"], stored["turn"]) == ("TurnStored", 0, 1)
    assert (stop["event"], stop["detail"]) == ("stop", "internal")
    assert "secret" not in (tmp_path / "logs" / EVENTS_FILE).read_text()


async def test_a_state_that_contradicts_itself_ends_the_run(tmp_path: Path) -> None:
    moderator = _Moderator(tmp_path)
    assert (await moderator.status())["failure"] is None
    moderator.conductor._slots[1].post = None
    assert (await moderator.status())["failure"] is None  # it was checked a moment ago
    moderator._validate_at = 0.0
    status = await moderator.status()
    assert "dialogue 1: it waits for nothing" in str(status["failure"])
    assert events(tmp_path)[0]["broken"] == "dialogue 1: it waits for nothing"


def test_the_first_failure_is_the_one_that_is_kept(tmp_path: Path) -> None:
    moderator = _Moderator(tmp_path)
    moderator.fail(KeyError())  # without a word: it stops the run all the same
    moderator.fail(OSError("a later one"))
    assert moderator.conductor.progress().stopped_by == "internal"
    assert moderator.conductor.progress().stopped
    assert events(tmp_path)[0]["error"] == "KeyError"
    assert len(moderator.logged) == 2


def test_a_disk_that_refuses_the_events_is_no_further_failure(tmp_path: Path) -> None:
    conductor = _Moderator(tmp_path).conductor
    write_events(tmp_path / "not on this node", conductor, KeyError())
    assert not (tmp_path / "not on this node").exists()
    (tmp_path / "logs" / EVENTS_FILE).mkdir(parents=True)
    write_events(tmp_path, conductor, KeyError())
    assert (tmp_path / "logs" / EVENTS_FILE).is_dir()


def test_the_events_of_an_earlier_failure_are_removed(tmp_path: Path) -> None:
    remove_events(tmp_path)  # there are none
    write_events(tmp_path, _Moderator(tmp_path).conductor, KeyError())
    remove_events(tmp_path)
    assert os.listdir(tmp_path / "logs") == []


def test_a_run_with_the_events_of_a_failure_is_opened_again(tmp_path: Path) -> None:
    moderator = _Moderator(tmp_path)
    run = builders.run_in(tmp_path / "run", moderator._context.settings)
    write_events(run.root, moderator.conductor, KeyError())
    assert (run.root / "logs" / EVENTS_FILE).exists()
    assert open_run(run.root, run.settings, run.plan).file.run_id == run.file.run_id
