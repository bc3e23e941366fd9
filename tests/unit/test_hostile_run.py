"""Whole runs against a hostile endpoint: real conductor, agents, ledger and sockets, without Ray."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from culturepark.dialogue.conductor import Conductor, Progress
from culturepark.dialogue.slots import COLLECTOR, Post
from culturepark.dialogue.speaker import CulturalSpeaker
from culturepark.limits.budget import Budget
from culturepark.messages import Ask, Outcome, encode, stored
from culturepark.models.chat import HttpChatModel
from culturepark.models.endpoint import HttpEndpoint
from culturepark.prompts.registry import profile_named
from culturepark.settings import BudgetSettings
from culturepark.store.ledger import Ledger
from culturepark.store.lock import RunLock
from culturepark.store.publish import publish
from culturepark.usage import Usage
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
        self.under_way = 0
        self.spent = Usage()
        self._terms = itertools.count(1)
        server.answer = self._answer

    def _answer(self, body: bytes) -> bytes:
        self.answered += 1
        return framed(good(f"In my village we have custom number {self.answered}, which guests praise."))

    async def live(self, tokens: int = 0) -> Progress:
        """Conduct until nothing more happens, or until that many tokens are spent."""
        with RunLock.acquire(self.run.root) as lock:
            ledger = Ledger(self.run, lock)
            term = next(self._terms)
            in_progress = ledger.begin(term)
            replicas = dict.fromkeys(self.plan.agent_cultures(), 1)
            conductor = Conductor(self.plan, self.of, ledger.done(), term, replicas, in_progress)
            budget = Budget(msgspec.structs.replace(self.of, budget=BudgetSettings(tokens=tokens)))
            await self._conduct(conductor, ledger, budget)
            self.spent = ledger.spent().get("speaker", Usage())
            ledger.close()
            publish(self.run, ledger.funnels)
        return conductor.progress()

    async def _conduct(self, conductor: Conductor, ledger: Ledger, budget: Budget) -> None:
        async def no_wait(seconds: float) -> None:
            await asyncio.sleep(0)

        settings, limits = self.of.models["chat"], self.of.limits
        endpoint = HttpEndpoint(settings, limits, sleep=no_wait)
        model = HttpChatModel(settings, limits, endpoint)
        profile = profile_named("full")
        speakers = {
            culture: CulturalSpeaker(self.plan, self.of, model, profile)
            for culture in self.plan.agent_cultures()
        }

        async def speak(address: str, ask: Ask) -> None:
            self.under_way += 1
            answer = await speakers[address.split("/")[1]].speak(ask)
            self.under_way -= 1
            send(conductor.on(answer, 0.0))

        def halt_if_spent() -> None:
            if reason := budget.reached(ledger.spent(), self.under_way):
                conductor.halt("budget", reason)
                endpoint.halt()

        def send(posts: list[Post]) -> None:
            for post in posts:
                if post.address == COLLECTOR:
                    raw = encode(post.message)
                    if isinstance(post.message, Outcome):
                        self.ends.append(post.message)
                    ledger.append(raw)
                    ledger.sync()
                    halt_if_spent()
                    send(conductor.on(stored(raw), 0.0))
                else:
                    assert isinstance(post.message, Ask)
                    tasks.create_task(speak(post.address, post.message))

        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            halt_if_spent()
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
    [
        "never",
        "drip-body",
        "reset-in-body",
        "429-billion",
        "surrogate",
        "10-mb",
        "300-kb-of-text",
        "endless-gzip",
        "length-of-zeros",
        "refusal",
        "403",
    ],
)
async def test_a_poisoned_dialogue_fails_alone_and_holds_up_no_other(tmp_path: Path, poison: str) -> None:
    async with Hostile().serving() as server:
        world = World(tmp_path, server)
        poisoned = world.plan.brief(0).affinity
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
    ("answer", "kind"),
    [
        ("401", "unauthorised"),
        ("401-cut", "unauthorised"),
        ("402", "unauthorised"),
        ("404", "no_such_model"),
    ],
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


@pytest.mark.parametrize("answer", ["403", "null-content"])
async def test_what_an_outage_took_is_counted_once_over_all_resumes(tmp_path: Path, answer: str) -> None:
    """A key that is revoked with a 403, and a model that says nothing and bills it: no dialogue is lost."""
    before, breaker = 37, 5
    async with Hostile().serving() as server:
        world = World(tmp_path, server, breaker=breaker)
        # It begins with silence, as above.
        server.rule = lambda met: "well" if met < before else "never" if met < before + AT_ONCE else answer
        progress = await world.live()
        assert (progress.stopped_by, progress.failed) == ("breaker", 0)
        free = server.met.total() - before - AT_ONCE if answer == "403" else 0
        assert world.spent.calls == server.met.total() - free
        assert world.spent.unreported == AT_ONCE
        progress = await world.live()
        assert progress.stopped_by == "breaker"
        free = server.met.total() - before - AT_ONCE if answer == "403" else 0
        assert world.spent.calls == server.met.total() - free
        server.rule = None
        progress = await world.live()
    assert (progress.ended, progress.failed, progress.stopped) == (DIALOGUES, 0, "")
    world.assert_whole()
    counted = json.loads((world.run.root / "summary.json").read_text("utf-8"))["usage"]["speaker"]
    assert counted["calls"] == world.spent.calls == server.met.total() - free
    assert counted["unreported"] == AT_ONCE


A_CALL = 12
"""Tokens of each of the endpoint's replies."""


@pytest.mark.parametrize("third", ["never", "null-content", "reset-in-body"])
async def test_a_budget_holds_where_calls_are_billed_and_bring_nothing(tmp_path: Path, third: str) -> None:
    """Each third call is billed like the others, and stalls, is empty, or breaks off."""
    limit = 1200
    async with Hostile().serving() as server:
        world = World(tmp_path, server, retries=3)
        server.rule = lambda met: third if met % 3 == 2 else "well"
        progress = await world.live(tokens=limit)
        assert progress.stopped_by == "budget"
        billed = A_CALL * server.met.total()
        assert 0.5 * limit <= billed <= limit + AT_ONCE * A_CALL
        assert world.spent.calls == server.met.total()
        again = await world.live(tokens=limit)
        assert (again.stopped_by, server.met.total()) == ("budget", billed // A_CALL)
        progress = await world.live()
    # Some may have met the third call too often in a row.
    assert (progress.ended, progress.stopped) == (DIALOGUES, "")
    assert world.spent.calls == server.met.total()
    told = world.spent.prompt_tokens + world.spent.completion_tokens
    assert told == A_CALL * (server.met.total() - world.spent.unreported)
