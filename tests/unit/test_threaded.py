"""An actor behind calls that are answered one at a time: it can always be found again."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors import base, threaded
from actors.base import MessagingActor
from actors.threaded import ThreadedActor

TOKEN = "token"


class Listening(MessagingActor):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("namespace", TOKEN))
        self.received: list[bytes] = []

    def prepare(self) -> None:
        """Needs the loop that it will live on."""
        asyncio.get_running_loop()

    def receive(self, payload: bytes) -> None:
        """Keep it."""
        self.received.append(payload)


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedActor]:
    monkeypatch.setattr(base, "_tune_process", lambda: None)
    monkeypatch.setattr(base.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    ended: list[int] = []
    monkeypatch.setattr(threaded.os, "_exit", ended.append)
    actor = threaded.threaded(Listening)()
    yield actor
    actor._loop.call_soon_threadsafe(actor._actor._inbox.close)
    actor._loop.call_soon_threadsafe(actor._loop.stop)
    until(lambda: ended == [1])  # an actor without its loop does not stay


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def enter(actor: ThreadedActor) -> socket.socket:
    connection = socket.create_connection(actor.where(), timeout=5)
    connection.sendall(TOKEN.encode())
    return connection


def test_it_has_the_name_of_its_actor_and_no_coroutine_that_would_make_ray_use_its_own_loop() -> None:
    kind = threaded.threaded(Listening)
    assert kind.__name__ == "Listening"
    assert not [name for name in dir(kind) if asyncio.iscoroutinefunction(getattr(kind, name))]


def test_watch_waits_while_a_sender_is_connected_and_lets_other_calls_in_when_none_is(
    actor: ThreadedActor,
) -> None:
    with ThreadPoolExecutor(1) as ray:  # its thread: one call at a time, in order
        incarnation = ray.submit(actor.watch).result(5)
        assert ray.submit(actor.watch, incarnation).result(5) == incarnation  # none has connected yet
        place = ray.submit(actor.where).result(5)
        first, second = enter(actor), enter(actor)
        until(lambda: actor._actor._inbox._senders == 2)
        waiting, behind = ray.submit(actor.watch, incarnation), ray.submit(actor.where)
        first.close()
        time.sleep(0.2)
        assert not waiting.done()
        second.close()
        assert waiting.result(5) == incarnation
        assert behind.result(5) == place


def test_a_connection_without_the_token_does_not_count(actor: ThreadedActor) -> None:
    with socket.create_connection(actor.where(), timeout=5) as stranger:
        stranger.sendall(b"guess" * 10)
        assert stranger.recv(1) == b""
    assert actor.watch(incarnation := actor.watch()) == incarnation


def test_what_keeps_an_actor_from_its_work_is_raised_to_those_that_wait_and_that_ask_later(
    actor: ThreadedActor,
) -> None:
    incarnation = actor.watch()
    with enter(actor):
        until(lambda: not actor._actor._inbox.no_senders.is_set())
        told: list[BaseException] = []

        def wait() -> None:
            try:
                actor.watch(incarnation)
            except OSError as error:
                told.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        actor._loop.call_soon_threadsafe(actor._actor.fail, OSError("no space"))
        waiting.join(5)
        assert len(told) == 1
        with pytest.raises(OSError, match="no space"):
            actor.watch(incarnation)
