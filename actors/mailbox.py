"""Messages between actors: many in one frame, over a connection of their own.

A Ray call costs about a millisecond of CPU whatever it carries, five times a bare model call. So Ray
makes, places, finds and restarts the actors, and what they say to each other goes over plain TCP
between their processes. A `Outbox` sends all that is posted in one round of the event loop as a frame,
and rounds are few and full (see `resting`); the receiving actor's `Inbox` hands each frame on and
acknowledges it. Delivery is at least once and in order: what was not acknowledged is sent again over the
next connection, so receivers are idempotent.

A connection begins with the run's token. A frame is its length, four bytes, and a msgpack array of
messages; an acknowledgement is the number of frames taken on this connection, four bytes.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

from culturepark.messages import pack

MAX_MESSAGES = 256
MAX_BYTES = 256 << 10
"""A frame is full from here on; a larger message has one for itself."""
_FRAME_LIMIT = 1 << 30
_ACK_FRAMES, _ACK_S = 64, 0.5
_CONNECT_S = 10.0
_AGAIN_S = (0.02, 0.05, 0.1, 0.2, 0.5)
_KEEPALIVE = [("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 25_000)]
"""In seconds, a count, and milliseconds. Without the last, the kernel would send what was under way to a
machine that has vanished again and again for a quarter of an hour, with its actor long since elsewhere."""

Place = tuple[str, int]
"""Host and port."""


class Outbox:
    """Messages to one actor.

    `find` tells where the actor's door is; it waits for an actor that is being restarted, and raises
    if there will be none. `on_taken` is told the messages of each frame that was acknowledged;
    `on_failure` is told once what `find` raised; `on_link` each time whether the connection stands.
    """

    def __init__(
        self,
        find: Callable[[], Awaitable[Place]],
        token: bytes,
        *,
        on_failure: Callable[[BaseException], None],
        on_taken: Callable[[list[bytes]], None] | None = None,
        on_link: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._find = find
        self._token = token
        self._on_failure = on_failure
        self._on_taken = on_taken
        self._on_link = on_link
        self._queue: deque[bytes] = deque()
        self._unacknowledged: deque[list[bytes]] = deque()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._flush: asyncio.Handle | None = None
        self._full = False
        self._connecting = self._connect()

    def post(self, message: bytes) -> None:
        """Queue a message."""
        self._queue.append(message)
        if self._flush is None and self._transport is not None and not self._full:
            self._flush = self._loop.call_soon(self.flush)

    def __len__(self) -> int:
        """Messages that were not acknowledged."""
        return len(self._queue) + sum(map(len, self._unacknowledged))

    def flush(self) -> None:
        """Send what is queued, as far as the connection takes it."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        while self._queue and self._transport is not None and not self._full:
            batch = self._next()
            self._unacknowledged.append(batch)
            self._transport.write(_framed(batch))

    def _next(self) -> list[bytes]:
        queue, batch, size = self._queue, list[bytes](), 0
        while queue and len(batch) < MAX_MESSAGES:
            size += len(queue[0])
            if batch and size > MAX_BYTES:
                break
            batch.append(queue.popleft())
        return batch

    # --- the connection

    def _connect(self) -> asyncio.Task[None]:
        task = self._loop.create_task(self._connected())
        task.add_done_callback(self._noticed)
        return task

    async def _connected(self) -> None:
        attempt = 0
        while True:
            try:
                host, port = await self._find()
                async with asyncio.timeout(_CONNECT_S):
                    await self._loop.create_connection(lambda: _OutboundConnection(self), host, port)
            except OSError:  # a timeout is one, too
                if self._transport is not None:
                    return  # it was made at the last moment
                await asyncio.sleep(_AGAIN_S[min(attempt, len(_AGAIN_S) - 1)])
                attempt += 1
            else:
                return

    def _noticed(self, connecting: asyncio.Task[None]) -> None:
        if not connecting.cancelled() and (error := connecting.exception()) is not None:
            self._on_failure(error)

    def made(self, transport: asyncio.Transport) -> None:
        """A connection stands: say who we are, and again what may have been lost with the last one."""
        keep_alive(transport)
        self._transport = transport
        self._full = False
        transport.write(self._token)
        for batch in self._unacknowledged:
            transport.write(_framed(batch))
        self.flush()
        self._on_link(True)

    def lost(self, transport: asyncio.Transport) -> None:
        """A connection broke: make another, if it was the one that stands."""
        if transport is not self._transport:
            return
        self._transport = None
        self._on_link(False)
        self._connecting = self._connect()

    def acknowledged(self, frames: int) -> None:
        """The receiver has taken this many further frames."""
        for _ in range(min(frames, len(self._unacknowledged))):
            batch = self._unacknowledged.popleft()
            if self._on_taken:
                self._on_taken(batch)

    def hold(self, full: bool) -> None:
        """The connection takes no more for now, or takes more again."""
        self._full = full
        if not full:
            self.flush()


class _OutboundConnection(asyncio.Protocol):
    """The sender's side of a connection."""

    def __init__(self, mailbox: Outbox) -> None:
        self._mailbox = mailbox
        self._transport: asyncio.Transport
        self._taken = 0
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is none by name
        self._mailbox.made(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._mailbox.lost(self._transport)

    def pause_writing(self) -> None:
        self._mailbox.hold(True)

    def resume_writing(self) -> None:
        self._mailbox.hold(False)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) - len(data) % 4
        self._rest = data[whole:]
        if whole:
            taken = int.from_bytes(data[whole - 4 : whole], "little")
            self._mailbox.acknowledged((taken - self._taken) % (1 << 32))
            self._taken = taken


class Inbox:
    """Where an actor takes messages.

    `take` is handed the payload of each frame. It returns None when the frame is taken, or a future
    that is done when it is; frames are acknowledged in order, and never if the future fails. What
    `take` raises goes to `on_failure`.
    """

    def __init__(
        self,
        take: Callable[[bytes], asyncio.Future[None] | None],
        token: bytes,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.take = take
        self.token = token
        self.on_failure = on_failure
        self.deserted = asyncio.Event()
        """Set while nobody is connected."""
        self.deserted.set()
        self._inside = 0
        self._server: asyncio.Server | None = None

    def count(self, change: int) -> None:
        """Somebody who knows the token has come, or has left."""
        self._inside += change
        (self.deserted.clear if self._inside else self.deserted.set)()

    async def open(self, host: str) -> Place:
        """Listen, if this does not yet; returns where."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(lambda: _InboundConnection(self), host, 0, backlog=1024)
        place: Place = self._server.sockets[0].getsockname()[:2]
        return place

    def close(self) -> None:
        """Listen no longer."""
        if self._server is not None:
            self._server.close()


class _InboundConnection(asyncio.Protocol):
    """The receiver's side of a connection."""

    def __init__(self, door: Inbox) -> None:
        self._door = door
        self._transport: asyncio.Transport
        self._buffer = b""
        self._known = False
        self._pending: deque[asyncio.Future[None]] = deque()
        self._taken = 0
        self._told = 0
        self._telling: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        keep_alive(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._known:
            self._door.count(-1)
        self._pending.clear()
        if self._telling is not None:
            self._telling.cancel()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        at = 0
        if not self._known:
            at = len(self._door.token)
            if len(buffer) < at:
                self._buffer = buffer
                return
            if not hmac.compare_digest(buffer[:at], self._door.token):
                self._transport.abort()
                return
            self._known = True
            self._door.count(1)
        while len(buffer) >= at + 4:
            length = int.from_bytes(buffer[at : at + 4], "little")
            if length > _FRAME_LIMIT:
                self._transport.abort()
                return
            if len(buffer) < at + 4 + length:
                break
            self._hand_on(buffer[at + 4 : at + 4 + length])
            at += 4 + length
        self._buffer = buffer[at:]

    def _hand_on(self, payload: bytes) -> None:
        try:
            taken = self._door.take(payload)
        except Exception as error:  # our own fault: say so, rather than let messages go unanswered
            self._door.on_failure(error)
            self._transport.abort()
            return
        if taken is None and not self._pending:
            self._taken += 1
            if self._taken - self._told >= _ACK_FRAMES:
                self._tell()
            elif self._telling is None:
                self._telling = asyncio.get_running_loop().call_later(_ACK_S, self._tell)
        elif taken is not None:
            self._pending.append(taken)
            taken.add_done_callback(self._settle)

    def _settle(self, _: asyncio.Future[None]) -> None:
        pending = self._pending
        before = self._taken
        while pending and pending[0].done():
            if pending[0].cancelled() or pending[0].exception() is not None:
                pending.clear()
                return
            pending.popleft()
            self._taken += 1
        if self._taken != before:
            self._tell()

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._told = self._taken
        self._transport.write((self._taken % (1 << 32)).to_bytes(4, "little"))


def keep_alive(transport: asyncio.Transport) -> None:
    """Small frames go at once, and a node that vanished without a word is noticed."""
    sock: socket.socket = transport.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for name, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _framed(batch: list[bytes]) -> bytes:
    payload = pack(batch)
    return len(payload).to_bytes(4, "little") + payload
