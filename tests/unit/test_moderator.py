"""The moderator without Ray: a fault of our own ends the run, and leaves what came before it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.moderator import EVENTS_FILE, Moderator, remove_events, write_events
from actors.run_context import RunContext
from culturepark.dialogue.conductor import Conductor
from culturepark.dialogue.slots import COLLECTOR, REFINERS
from culturepark.messages import Message, Spent, Spoke, Turn, decode, encode, encode_in_progress, pack
from culturepark.store.rundir import open_run
from tests import builders

SECRET = "my grandmother's secret"
SETTINGS = builders.settings(
    plan={"cultures": ["arabic"], "questions": ["wvs7-q28"], "dialogues_per_question": 10},
    limits={"dialogues_in_flight": 3},
)


class _Remote:
    """A method of an actor, as Ray's handle shows it."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    async def remote(self, *given: Any) -> Any:
        return self._answer(*given)


class _Watch:
    """The `watch` of an actor that is never lost."""

    async def remote(self, known: str) -> str:
        if known:
            await asyncio.Event().wait()
        return "an incarnation"


class _Outbox:
    """Keeps what is posted, and what is to be called when it is acknowledged."""

    def __init__(self, address: str, posted: list[tuple[str, Message]]) -> None:
        self._address = address
        self._posted = posted
        self.acknowledge: Callable[[int, list[bytes]], None]

    def post(self, message: bytes) -> int:
        self._posted.append((self._address, decode(message)))
        return len(self._posted) - 1


class _Moderator(Moderator):
    """A moderator of ten dialogues in a new run, with handles and outboxes that are no more than needed."""

    def __init__(self, root: Path) -> None:
        run = builders.run_in(root, SETTINGS)
        replicas = dict.fromkeys([*run.plan.agent_cultures(), REFINERS], 1)
        super().__init__(RunContext.of(run, SETTINGS).packed(), ("namespace", "token"), replicas)
        self.posted: list[tuple[str, Message]] = []
        self._boxes: dict[str, _Outbox] = {}

    @property
    def conductor(self) -> Conductor:
        assert self._conductor is not None
        return self._conductor

    def handle(self, address: str) -> Any:
        if address == COLLECTOR:
            begun = (bytes(2), encode_in_progress([]), encode(Spent({})))
            return SimpleNamespace(begin=_Remote(lambda term: begun))
        return SimpleNamespace(watch=_Watch())

    def outbox(self, address: str, **options: Any) -> Any:
        box = self._boxes.setdefault(address, _Outbox(address, self.posted))
        if acknowledged := options["on_acknowledged"]:
            box.acknowledge = acknowledged
        return box

    def store(self, message: Message) -> None:
        """The collector has this on disk."""
        self._boxes[COLLECTOR].acknowledge(0, [encode(message)])


async def started(root: Path) -> _Moderator:
    moderator = _Moderator(root)
    await moderator.start()
    return moderator


def events(root: Path) -> list[dict[str, Any]]:
    lines = (root / "logs" / EVENTS_FILE).read_bytes().splitlines()
    return [json.loads(line) for line in lines]


def logged(root: Path, event: str) -> list[dict[str, Any]]:
    lines = (root / "logs" / "moderator.jsonl").read_bytes().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


async def test_it_starts_once_and_fills_its_slots(tmp_path: Path) -> None:
    moderator = await started(tmp_path)
    await moderator.start()
    assert len(moderator.posted) == 3
    assert (await moderator.status())["progress"]["in_flight"] == 3
    (line,) = logged(tmp_path, "started")
    assert (line["planned"], line["ended"], line["begun"]) == (10, 0, 0)
    assert {message.term for _, message in moderator.posted} == {line["take"]}


async def test_an_error_of_the_first_fill_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        raise KeyError(SECRET)

    monkeypatch.setattr("culturepark.dialogue.conductor.Conductor.fill", fault)
    moderator = await started(tmp_path)
    status = await moderator.status()
    assert isinstance(status["failure"], KeyError)
    assert status["progress"]["stopped_by"] == "internal"
    assert events(tmp_path)[0]["error"] == "KeyError"
    assert not moderator.posted


async def test_the_events_of_an_earlier_failure_are_removed_at_the_start(tmp_path: Path) -> None:
    moderator = _Moderator(tmp_path)
    (tmp_path / "logs" / EVENTS_FILE).write_text("{}")
    await moderator.start()
    assert os.listdir(tmp_path / "logs") == ["moderator.jsonl"]


async def test_an_error_of_the_conductor_ends_the_run_and_leaves_its_last_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moderator = await started(tmp_path)
    _, first = moderator.posted[0]
    moderator.receive(pack([encode(Spoke(0, first.term, Turn(1, 0, SECRET)))]))
    address, spoken = moderator.posted[-1]
    assert address == COLLECTOR
    assert not (tmp_path / "logs" / EVENTS_FILE).exists()

    def fault(*_: object) -> None:
        raise KeyError(SECRET)

    monkeypatch.setattr("culturepark.dialogue.conductor.step", fault)
    moderator.store(spoken)
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


async def test_a_state_that_contradicts_itself_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moderator = await started(tmp_path)
    assert (await moderator.status())["failure"] is None
    moderator.conductor._slots[1].post = None
    assert (await moderator.status())["failure"] is None  # it was checked a moment ago
    later = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + 60)
    monkeypatch.setattr("actors.moderator.time", later)
    status = await moderator.status()
    assert "dialogue 1: it waits for nothing" in str(status["failure"])
    assert events(tmp_path)[0]["broken"] == "dialogue 1: it waits for nothing"


async def test_the_first_failure_is_the_one_that_is_kept(tmp_path: Path) -> None:
    moderator = await started(tmp_path)
    moderator.fail(KeyError())  # without a word: it stops the run all the same
    moderator.fail(OSError("a later one"))
    assert moderator.conductor.progress().stopped_by == "internal"
    assert moderator.conductor.progress().stopped
    assert events(tmp_path)[0]["error"] == "KeyError"
    assert len(logged(tmp_path, "failed")) == 2


async def test_a_disk_that_refuses_the_events_is_no_further_failure(tmp_path: Path) -> None:
    conductor = (await started(tmp_path / "run")).conductor
    write_events(tmp_path / "not on this node", conductor, KeyError())
    assert not (tmp_path / "not on this node").exists()
    (tmp_path / "logs" / EVENTS_FILE).mkdir(parents=True)
    write_events(tmp_path, conductor, KeyError())
    assert (tmp_path / "logs" / EVENTS_FILE).is_dir()
    remove_events(tmp_path)  # not even it can be removed


async def test_a_run_with_the_events_of_a_failure_is_opened_again(tmp_path: Path) -> None:
    moderator = await started(tmp_path)
    moderator.fail(KeyError())
    assert (tmp_path / "logs" / EVENTS_FILE).exists()
    open_run(tmp_path, SETTINGS, builders.plan(SETTINGS))
