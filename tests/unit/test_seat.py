"""A station behind calls that are answered one at a time: it can always be found again."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors import directory
from actors import threaded as seats
from actors.directory import MessagingActor
from actors.threaded import ThreadedActor, threaded

TOKEN = "token"


class Listening(MessagingActor):
    """A station that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("namespace", TOKEN))
        self.taken: list[bytes] = []

    def prepare(self) -> None:
        """Needs the loop that it will live on."""
        asyncio.get_running_loop()

    def take(self, payload: bytes) -> None:
        """Keep it."""
        self.taken.append(payload)


@pytest.fixture
def seat(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedActor]:
    monkeypatch.setattr(directory, "_settle", lambda: None)
    monkeypatch.setattr(directory.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    ended: list[int] = []
    monkeypatch.setattr(seats.os, "_exit", ended.append)
    seat = threaded(Listening)()
    yield seat
    seat._loop.call_soon_threadsafe(seat._station._door.close)
    seat._loop.call_soon_threadsafe(seat._loop.stop)
    until(lambda: ended == [1])  # an actor without its loop does not stay


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def enter(seat: ThreadedActor) -> socket.socket:
    connection = socket.create_connection(seat.where(), timeout=5)
    connection.sendall(TOKEN.encode())
    return connection


def test_it_has_the_name_of_its_station_and_no_coroutine_that_would_make_ray_use_its_own_loop() -> None:
    kind = threaded(Listening)
    assert kind.__name__ == "Listening"
    assert not [name for name in dir(kind) if asyncio.iscoroutinefunction(getattr(kind, name))]


def test_watch_waits_while_somebody_is_connected_and_lets_other_calls_in_when_nobody_is(
    seat: ThreadedActor,
) -> None:
    with ThreadPoolExecutor(1) as ray:  # its thread: one call at a time, in order
        life = ray.submit(seat.watch).result(5)
        assert ray.submit(seat.watch, life).result(5) == life  # nobody has come yet
        place = ray.submit(seat.where).result(5)
        first, second = enter(seat), enter(seat)
        until(lambda: seat._station._door._inside == 2)
        waiting, behind = ray.submit(seat.watch, life), ray.submit(seat.where)
        first.close()
        time.sleep(0.2)
        assert not waiting.done()
        second.close()
        assert waiting.result(5) == life
        assert behind.result(5) == place


def test_a_stranger_at_the_door_does_not_count(seat: ThreadedActor) -> None:
    with socket.create_connection(seat.where(), timeout=5) as stranger:
        stranger.sendall(b"guess" * 10)
        assert stranger.recv(1) == b""
    assert seat.watch(life := seat.watch()) == life


def test_what_keeps_a_station_from_its_work_is_raised_to_who_waits_and_to_who_asks_later(
    seat: ThreadedActor,
) -> None:
    life = seat.watch()
    with enter(seat):
        until(lambda: not seat._station._door.deserted.is_set())
        told: list[BaseException] = []

        def wait() -> None:
            try:
                seat.watch(life)
            except OSError as error:
                told.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        seat._loop.call_soon_threadsafe(seat._station.broke, OSError("no space"))
        waiting.join(5)
        assert len(told) == 1
        with pytest.raises(OSError, match="no space"):
            seat.watch(life)
