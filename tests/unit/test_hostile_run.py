"""Whole runs against a hostile endpoint: real conductor, agents, ledger and sockets, without Ray."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from culturepark.agent import CulturalSpeaker
from culturepark.conductor import COLLECTOR, Conductor, Post, Progress
from culturepark.messages import Ask, Outcome, encode, on_disk
from culturepark.models.chat import HttpChatModel
from culturepark.models.http import HttpEndpoint
from culturepark.prompts.profile import profile_named
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.publish import publish
from tests import builders
from tests.hostile import MISDEEDS, Hostile, framed, good

AT_ONCE = 8
DIALOGUES = 30
RETRIES = 1


class World:
    """A run directory and an endpoint; every `live` is a process that goes on with the run."""

    def __init__(self, root: Path, server: Hostile, **limits: Any) -> None:
        chat = {"engine": "openai", "model": "good-model", "base_urls": [server.url], "profile": "full"}
        self.of = builders.settings(
            models={"chat": chat, "vectors": {"engine": "scripted"}},
            plan={
                "cultures": ["arabic"],
                "questions": ["wvs7-q28"],
                "dialogues_per_question": DIALOGUES,
                "utterances": 4,
            },
            refine={"enabled": False},
            health={"off": True},  # every answer is alike
            limits={"dialogues_in_flight": AT_ONCE, "retries": RETRIES, "deadline_s": 0.5, **limits},
        )
        self.run = builders.run_in(root, self.of)
        self.plan = self.run.plan
        self.answered = 0
        self.ends: list[Outcome] = []
        self._takes = itertools.count(1)
        server.answer = self._answer

    def _answer(self, body: bytes) -> bytes:
        self.answered += 1
        return framed(good(f"In my village we have custom number {self.answered}, which guests praise."))

    async def live(self) -> Progress:
        """Conduct until nothing more happens."""
        with RunLock.take(self.run.root) as lock:
            ledger = Ledger(self.run, lock)
            take = next(self._takes)
            begun = ledger.begin(take)
            replicas = dict.fromkeys(self.plan.agent_cultures(), 1)
            conductor = Conductor(self.plan, self.of, ledger.done(), take, replicas, begun)
            await self._conduct(conductor, ledger)
            ledger.close()
            publish(self.run, ledger.funnels)
        return conductor.progress()

    async def _conduct(self, conductor: Conductor, ledger: Ledger) -> None:
        async def no_wait(seconds: float) -> None:
            await asyncio.sleep(0)

        settings, limits = self.of.models["chat"], self.of.limits
        model = HttpChatModel(settings, limits, HttpEndpoint(settings, limits, sleep=no_wait))
        profile = profile_named("full")
        speakers = {
            culture: CulturalSpeaker(self.plan, self.of, model, profile)
            for culture in self.plan.agent_cultures()
        }

        async def speak(address: str, ask: Ask) -> None:
            answer = await speakers[address.split("/")[1]].speak(ask)
            send(conductor.on(answer, 0.0))

        def send(posts: list[Post]) -> None:
            for post in posts:
                if post.address == COLLECTOR:
                    raw = encode(post.message)
                    if isinstance(post.message, Outcome):
                        self.ends.append(post.message)
                    ledger.append(raw)
                    ledger.sync()
                    send(conductor.on(on_disk(raw), 0.0))
                else:
                    assert isinstance(post.message, Ask)
                    tasks.create_task(speak(post.address, post.message))

        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            send(conductor.fill(0.0))
        await model.close()

    def assert_whole(self, *failed: int) -> None:
        """Every dialogue ended once, and nothing that was paid for is missing or there twice."""
        assert sorted(end.number for end in self.ends) == list(range(DIALOGUES))
        assert {end.number for end in self.ends if end.failed} == set(failed)
        texts = [turn.text for end in self.ends for turn in end.turns]
        assert len(set(texts)) == len(texts) == self.answered
        assert len(texts) == 4 * (DIALOGUES - len(failed))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "proj.4f9c2a7e11d0b6338855")


@pytest.mark.parametrize(
    "poison",
    ["never", "drip-body", "reset-in-body", "429-billion", "surrogate", "10-mb", "endless-gzip", "refusal"],
)
async def test_a_poisoned_dialogue_fails_alone_and_holds_up_nobody(tmp_path: Path, poison: str) -> None:
    async with Hostile().serving() as server:
        world = World(tmp_path, server)
        poisoned = world.plan.brief(0).id
        server.turns[poisoned] = [poison]
        progress = await world.live()
    assert (progress.ended, progress.failed, progress.stopped) == (DIALOGUES, 1, "")
    world.assert_whole(0)
    (failure,) = (end for end in world.ends if end.failed)
    kind = MISDEEDS[poison][1]
    assert failure.failed == kind
    assert failure.reason
    if kind == "timeout":
        assert world.ends.index(failure) >= AT_ONCE  # the first to begin: later ones went past it
        assert server.met[poisoned] == 1 + RETRIES


async def test_an_outage_trips_the_breaker_and_a_resume_goes_on(tmp_path: Path) -> None:
    before, breaker = 37, 5
    async with Hostile().serving() as server:
        world = World(tmp_path, server, breaker=breaker)

        def rule(met: int) -> str:
            # It begins with silence, in which good replies that are under way are taken: one that came after
            # a dialogue was given up would say that the endpoint is well, and the failure its own.
            silent = before <= met < before + AT_ONCE
            return "well" if met < before else "never" if silent else ("503", "never", "reset")[met % 3]

        server.rule = rule
        progress = await world.live()
        assert progress.stopped_by == "breaker"
        assert progress.failed == 0
        assert 0 < progress.ended < DIALOGUES
        # Those that failed until it tripped, and those that were under way when it did.
        assert server.met.total() - before <= (breaker + AT_ONCE) * (1 + RETRIES)
        again = await world.live()
        assert (again.stopped_by, again.ended) == ("breaker", progress.ended)
        server.rule = None
        progress = await world.live()
    assert (progress.ended, progress.failed, progress.stopped) == (DIALOGUES, 0, "")
    world.assert_whole()


@pytest.mark.parametrize(
    ("answer", "kind"), [("401", "unauthorised"), ("401-cut", "unauthorised"), ("404", "no_such_model")]
)
async def test_a_key_or_model_that_is_lost_in_mid_run(tmp_path: Path, answer: str, kind: str) -> None:
    async with Hostile().serving() as server:
        world = World(tmp_path, server)
        server.rule = lambda met: "well" if met < 37 else answer
        progress = await world.live()
        assert progress.stopped_by == kind
        assert progress.failed == 0
        assert server.met.total() - 37 <= AT_ONCE  # each that was under way learns it once
        server.rule = None
        progress = await world.live()
    assert (progress.ended, progress.failed, progress.stopped) == (DIALOGUES, 0, "")
    world.assert_whole()
