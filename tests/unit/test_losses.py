"""Noticing that an actor was lost: by the lives that it has had, not by who happens to be looking."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError

from actors import directory
from actors.directory import MessagingActor, losses


class Idle(MessagingActor):
    """An actor that takes nothing."""

    def take(self, payload: bytes) -> None:
        """Not needed here."""


class Actor:
    """An actor as Ray's handle shows it: what is under way in a life fails when it ends."""

    def __init__(self) -> None:
        self.watch = self  # so that `handle.watch.remote(...)` leads here
        self._watchers: list[asyncio.Task[str]] = []
        self.calls = 0
        self.begin()

    def begin(self) -> None:
        self._station = Idle(("namespace", "token"))
        self._station._door.count(1)  # pyright: ignore[reportPrivateUsage] - the caller is connected

    def die(self) -> None:
        """End this life; another begins at once."""
        for task in self._watchers:
            task.cancel()
        self._watchers.clear()
        self.begin()

    async def remote(self, known: str) -> str:
        self.calls += 1
        task = asyncio.ensure_future(self._station.watch(known))
        self._watchers.append(task)
        await asyncio.wait([task])
        if task.cancelled():
            raise RayActorError
        return task.result()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(directory, "_AGAIN_S", 0.01)
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
    await until(lambda: actor.calls == 2)  # it knows the first life, and waits for its end
    assert not seen
    for count in (1, 2, 3):
        actor.die()
        await until(lambda count=count: len(seen) == count)
        await asyncio.sleep(0.03)
        assert len(seen) == count
    task.cancel()


async def test_a_life_between_two_looks_is_not_missed(seen: list[str]) -> None:
    actor = Actor()
    task = await looking(actor, seen)
    await until(lambda: actor.calls == 2)
    actor.die()
    await asyncio.sleep(0.005)  # the loss is known, and nobody is looking for a moment:
    actor.die()  # meanwhile another life has begun, has taken what was sent, and is over
    before = len(seen)
    await until(lambda: len(seen) > before)
    task.cancel()


async def test_a_life_that_ends_before_the_first_look_is_answered(seen: list[str]) -> None:
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


async def test_who_is_not_connected_asks_again_and_sees_no_loss(seen: list[str]) -> None:
    actor = Actor()
    actor._station._door.count(-1)  # pyright: ignore[reportPrivateUsage]
    task = await looking(actor, seen)
    await until(lambda: actor.calls == 4)
    actor._station._door.count(1)  # pyright: ignore[reportPrivateUsage]
    await asyncio.sleep(0.03)
    before = actor.calls
    await asyncio.sleep(0.03)
    assert actor.calls == before  # it waits now
    actor.die()
    await until(lambda: len(seen) == 1)
    task.cancel()
