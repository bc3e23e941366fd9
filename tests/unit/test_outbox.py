"""Messages between actors over real sockets: all of them, in order, whatever breaks on the way."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

import actors.mailbox
from actors.mailbox import MAX_BYTES, Inbox, Outbox, Place
from culturepark.messages import OutcomeStored, encode, pack, unpack

TOKEN = b"t" * 32
HERE = "127.0.0.1"


def message(number: int, size: int = 0) -> bytes:
    return encode(OutcomeStored(number, "x" * size))


class Receiver:
    """Receives frames; with `refuse` it fails, with `later` it keeps them waiting."""

    def __init__(self, token: bytes = TOKEN) -> None:
        self.numbers: list[int] = []
        self.frames = 0
        self.later: list[asyncio.Future[None]] | None = None
        self.errors: list[BaseException] = []
        self.refuse = False
        self.inbox = Inbox(self.receive, token, self.errors.append)

    def receive(self, payload: bytes) -> asyncio.Future[None] | None:
        if self.refuse:
            raise RuntimeError("on purpose")
        self.frames += 1
        for one in unpack(payload):
            assert isinstance(one, OutcomeStored)
            self.numbers.append(one.number)
        if self.later is None:
            return None
        self.later.append(asyncio.get_running_loop().create_future())
        return self.later[-1]


async def until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


def outbox_to(find: Callable[[], Place], **options: object) -> Outbox:
    async def found() -> Place:
        return find()

    def failed(error: BaseException) -> None:
        raise AssertionError(error)

    return Outbox(found, TOKEN, on_failure=failed, **options)  # type: ignore[arg-type]


async def test_all_arrive_in_order_in_few_frames() -> None:
    receiver = Receiver()
    place = await receiver.inbox.open(HERE)
    box = outbox_to(lambda: place)
    for number in range(3000):
        box.post(message(number))
    await until(lambda: len(receiver.numbers) == 3000)
    assert receiver.numbers == list(range(3000))
    assert receiver.frames <= 30


async def test_large_messages_get_frames_of_their_own() -> None:
    receiver = Receiver()
    place = await receiver.inbox.open(HERE)
    box = outbox_to(lambda: place)
    for number in range(8):
        box.post(message(number, MAX_BYTES))
    await until(lambda: len(receiver.numbers) == 8)
    assert receiver.frames == 8


async def test_messages_are_acknowledged_only_when_the_receiver_says_so() -> None:
    receiver = Receiver()
    receiver.later = []
    acknowledged: list[tuple[int, list[bytes]]] = []
    place = await receiver.inbox.open(HERE)
    box = outbox_to(lambda: place, on_acknowledged=lambda first, batch: acknowledged.append((first, batch)))
    box.post(message(1))
    await until(lambda: receiver.numbers == [1])
    box.post(message(2))
    await until(lambda: receiver.numbers == [1, 2])
    receiver.later[1].set_result(None)  # out of order: the first is still open
    await asyncio.sleep(0.05)
    assert not acknowledged
    receiver.later[0].set_result(None)
    await until(lambda: acknowledged == [(0, [message(1)]), (1, [message(2)])])
    assert len(box) == 0


async def test_a_frame_that_is_handled_at_once_waits_for_earlier_ones_with_its_acknowledgement() -> None:
    receiver = Receiver()
    later = receiver.later = []
    acknowledged: list[int] = []
    place = await receiver.inbox.open(HERE)
    box = outbox_to(lambda: place, on_acknowledged=lambda first, batch: acknowledged.append(first))
    box.post(message(1))
    await until(lambda: receiver.numbers == [1])
    receiver.later = None
    box.post(message(2))
    await until(lambda: receiver.numbers == [1, 2])
    await asyncio.sleep(0.05)
    assert not acknowledged
    later[0].set_result(None)
    await until(lambda: acknowledged == [0, 1])


async def test_after_a_frame_that_could_not_be_handled_none_is_acknowledged() -> None:
    receiver = Receiver()
    receiver.later = []
    acknowledged: list[int] = []
    place = await receiver.inbox.open(HERE)
    box = outbox_to(lambda: place, on_acknowledged=lambda first, batch: acknowledged.append(first))
    for number in (1, 2, 3):
        box.post(message(number))
        await until(lambda number=number: receiver.numbers[-1:] == [number])
    receiver.later[1].cancel()
    receiver.later[0].set_result(None)
    await until(lambda: acknowledged == [0])
    receiver.later[2].set_result(None)
    receiver.later = None
    box.post(message(4))
    await until(lambda: receiver.numbers == [1, 2, 3, 4])
    await asyncio.sleep(0.05)
    assert acknowledged == [0]
    assert len(box) == 3


async def test_what_was_not_acknowledged_comes_again_after_a_restart() -> None:
    first, second = Receiver(), Receiver()
    first.later = []
    places = [await first.inbox.open(HERE)]
    box = outbox_to(lambda: places[-1])
    box.post(message(1))
    await until(lambda: first.numbers == [1])
    places.append(await second.inbox.open(HERE))
    first.inbox.close()
    first.later[0].cancel()  # it died before it was done
    assert box._transport is not None
    box._transport.abort()
    box.post(message(2))
    await until(lambda: second.numbers == [1, 2])


async def test_equal_messages_are_told_apart_by_their_sequence_numbers_over_a_reconnection_too() -> None:
    receiver = Receiver()
    receiver.later = []
    place = await receiver.inbox.open(HERE)
    numbers: list[int] = []

    def acknowledged(first: int, batch: list[bytes]) -> None:
        numbers.extend(range(first, first + len(batch)))

    box = outbox_to(lambda: place, on_acknowledged=acknowledged)
    assert [box.post(message(1)), box.post(message(1))] == [0, 1]
    await until(lambda: receiver.numbers == [1, 1])
    receiver.later.pop().set_result(None)
    await until(lambda: numbers == [0, 1])
    assert box.post(message(1)) == 2
    await until(lambda: receiver.frames == 2)
    assert box._transport is not None
    box._transport.abort()  # before the second frame was acknowledged
    await until(lambda: receiver.frames == 3)  # it came again
    assert box.post(message(1)) == 3
    await until(lambda: receiver.frames == 4)
    assert len(box) == 2
    for handled in receiver.later:
        handled.set_result(None)
    await until(lambda: numbers == [0, 1, 2, 3])
    assert len(box) == 0
    receiver.inbox.close()


async def test_a_receiver_that_vanished_with_messages_under_way_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its kernel acknowledges nothing more: the machine is gone, or, here, its buffers are full."""
    monkeypatch.setattr(actors.mailbox, "_KEEPALIVE", [("TCP_USER_TIMEOUT", 300)])
    receiver = Receiver()
    place = await receiver.inbox.open(HERE)
    with socket.create_server((HERE, 0)) as silent:
        places = iter([silent.getsockname()[:2]])
        box = outbox_to(lambda: next(places, place))
        for number in range(40):
            box.post(message(number, MAX_BYTES))
        await until(lambda: len(receiver.numbers) == 40)
    assert receiver.numbers == list(range(40))
    receiver.inbox.close()


async def test_a_receiver_that_fails_says_so_and_gets_it_again() -> None:
    receiver = Receiver()
    receiver.refuse = True
    place = await receiver.inbox.open(HERE)
    box = outbox_to(lambda: place)
    box.post(message(1))
    await until(lambda: bool(receiver.errors))
    receiver.refuse = False
    await until(lambda: receiver.numbers == [1])


async def test_it_tells_whether_its_connection_stands() -> None:
    receiver, told = Receiver(), list[bool]()
    place = await receiver.inbox.open(HERE)
    box = outbox_to(lambda: place, on_connection=told.append)
    await until(lambda: told == [True])
    assert box._transport is not None
    box._transport.abort()
    await until(lambda: told == [True, False, True])
    receiver.inbox.close()


async def test_a_connection_that_is_made_just_as_its_time_is_over_is_the_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receiver = Receiver()
    place = await receiver.inbox.open(HERE)
    loop, made = asyncio.get_running_loop(), 0

    async def late(protocol: Callable[[], asyncio.Protocol], host: str, port: int) -> None:
        nonlocal made
        made += 1
        await create(protocol, host, port)
        raise TimeoutError

    create = loop.create_connection
    monkeypatch.setattr(loop, "create_connection", late)
    box = outbox_to(lambda: place)
    for number in range(3):
        box.post(message(number))
        await until(lambda: len(receiver.numbers) == number + 1)  # noqa: B023 - awaited at once
    assert made == 1
    assert receiver.numbers == [0, 1, 2]
    receiver.inbox.close()


async def test_the_loss_of_a_connection_that_no_longer_stands_changes_nothing() -> None:
    receiver, told = Receiver(), list[bool]()
    place = await receiver.inbox.open(HERE)
    box = outbox_to(lambda: place, on_connection=told.append)
    await until(lambda: told == [True])
    old = box._transport
    assert old is not None
    old.abort()
    await until(lambda: told == [True, False, True])
    box.disconnected(old)
    box.post(message(1))
    await until(lambda: receiver.numbers == [1])
    assert told == [True, False, True]
    receiver.inbox.close()


async def test_no_sender_gets_in_without_the_token() -> None:
    receiver = Receiver(token=b"s" * 32)
    host, port = await receiver.inbox.open(HERE)
    for greeting in (TOKEN, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4, b""):
        reader, writer = await asyncio.open_connection(host, port)
        payload = pack([message(1)])
        writer.write(greeting + len(payload).to_bytes(4, "little") + payload)
        if greeting:
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
        writer.close()
    assert receiver.numbers == []


async def test_frames_cut_anywhere_are_put_together() -> None:
    receiver = Receiver()
    host, port = await receiver.inbox.open(HERE)
    _, writer = await asyncio.open_connection(host, port)
    payload = pack([message(7), message(8)])
    for byte in TOKEN + (len(payload).to_bytes(4, "little") + payload) * 2:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    await until(lambda: receiver.numbers == [7, 8, 7, 8])
    writer.close()
