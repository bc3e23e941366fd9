"""Noticing that an actor was lost: by its incarnations, not by which call happens to fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError

from actors import supervision
from actors.base import MessagingActor
from actors.supervision import losses


class Idle(MessagingActor):
    """An actor that receives nothing."""

    def receive(self, payload: bytes) -> None:
        """Not needed here."""


class Actor:
    """An actor as Ray's handle shows it: what is under way in an incarnation fails when it ends."""

    def __init__(self) -> None:
        self.watch = self  # so that `handle.watch.remote(...)` leads here
        self._watchers: list[asyncio.Task[str]] = []
        self.calls = 0
        self.begin()

    def begin(self) -> None:
        self._actor = Idle(("namespace", "token"))
        self._actor._inbox.count_senders(1)  # pyright: ignore[reportPrivateUsage] - the caller is connected

    def die(self) -> None:
        """End this incarnation; another begins at once."""
        for task in self._watchers:
            task.cancel()
        self._watchers.clear()
        self.begin()

    async def remote(self, known: str) -> str:
        self.calls += 1
        task = asyncio.ensure_future(self._actor.watch(known))
        self._watchers.append(task)
        await asyncio.wait([task])
        if task.cancelled():
            raise RayActorError
        return task.result()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(supervision, "RETRY_S", 0.01)
    return []


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def looking(actor: Actor, seen: list[str]) -> asyncio.Task[None]:
    async def look() -> None:
        async for why in losses(actor):
            seen.append(why)  # noqa: PERF401

    task = asyncio.create_task(look())
    await until(lambda: actor.calls)
    return task


async def test_each_loss_is_seen_once(seen: list[str]) -> None:
    actor = Actor()
    task = await looking(actor, seen)
    await until(lambda: actor.calls == 2)  # it knows the first incarnation, and waits for its end
    assert not seen
    for count in (1, 2, 3):
        actor.die()
        await until(lambda count=count: len(seen) == count)
        await asyncio.sleep(0.03)
        assert len(seen) == count
    task.cancel()


async def test_an_incarnation_between_two_looks_is_not_missed(seen: list[str]) -> None:
    actor = Actor()
    task = await looking(actor, seen)
    await until(lambda: actor.calls == 2)
    actor.die()
    await asyncio.sleep(0.005)  # the loss is known, and for a moment no call is under way:
    actor.die()  # meanwhile another has begun, has received what was sent, and is over
    before = len(seen)
    await until(lambda: len(seen) > before)
    task.cancel()


async def test_an_incarnation_that_ends_before_the_first_look_is_answered(seen: list[str]) -> None:
    actor = Actor()
    task = await looking(actor, seen)
    actor.die()
    await until(lambda: seen)
    task.cancel()


async def test_a_call_that_gets_lost_is_no_loss(seen: list[str]) -> None:
    actor = Actor()
    task = await looking(actor, seen)
    await until(lambda: actor.calls == 2)
    for watcher in actor._watchers:  # pyright: ignore[reportPrivateUsage]
        watcher.cancel()  # the call fails, and the actor lives on
    await until(lambda: actor.calls == 3)
    await asyncio.sleep(0.03)
    assert not seen
    task.cancel()


async def test_a_caller_that_is_not_connected_asks_again_and_sees_no_loss(seen: list[str]) -> None:
    actor = Actor()
    actor._actor._inbox.count_senders(-1)  # pyright: ignore[reportPrivateUsage]
    task = await looking(actor, seen)
    await until(lambda: actor.calls == 4)
    actor._actor._inbox.count_senders(1)  # pyright: ignore[reportPrivateUsage]
    await asyncio.sleep(0.03)
    before = actor.calls
    await asyncio.sleep(0.03)
    assert actor.calls == before  # it waits now
    actor.die()
    await until(lambda: len(seen) == 1)
    task.cancel()
