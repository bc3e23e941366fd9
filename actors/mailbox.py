"""Messages between actors: many in one frame, over a connection of their own.

A Ray call costs about a millisecond of CPU whatever it carries, five times a bare model call. So Ray
makes, places, finds and restarts the actors, and what they say to each other goes over plain TCP
between their processes. A sender's `Outbox` sends all that is posted in one round of the event loop as
a frame, and rounds are few and full (see `event_batching`); the receiving actor's `Inbox` hands each frame
on and acknowledges it. Delivery is in order and at least once (at-least-once): frames that were not
acknowledged are sent again over the next connection, so receivers are idempotent.

A connection begins with the run's token. A frame is its length, four bytes, and a msgpack array of
messages (length-prefixed framing). An acknowledgement is the number of frames that were handled on this
connection so far, four bytes (cumulative acknowledgement). All numbers are little-endian.
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
"""A frame holds at most this many messages."""
MAX_BYTES = 256 << 10
"""A frame holds at most this many bytes of messages, except that a larger message has a frame for itself."""
_FRAME_LIMIT = 1 << 30
"""A connection that announces a frame of more bytes than this is closed."""
_ACK_FRAMES, _ACK_S = 64, 0.5
"""An acknowledgement is sent after this many frames, or this many seconds (delayed acknowledgement)."""
_CONNECT_S = 10.0
"""Seconds within which a connection is made."""
_BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Seconds before each further attempt to connect (backoff); the last one repeats."""
_KEEPALIVE = [("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 25_000)]
"""Options of TCP (keep-alive), in seconds, seconds, a count and milliseconds. Without the last, the kernel
would go on sending to a machine that has vanished for a quarter of an hour, with its actor long since
elsewhere."""

Place = tuple[str, int]
"""Host and port of an inbox."""


class Outbox:
    """Sends messages to one actor (at-least-once, in order).

    `find` tells where the actor's inbox is; it waits for an actor that is being restarted, and raises
    if there will be none. `on_acknowledged` is told of each frame that was acknowledged: the sequence
    number of its first message, and its messages, which are numbered consecutively. `on_failure` is told
    once what `find` raised; `on_connection` each time whether the connection stands.
    """

    def __init__(
        self,
        find: Callable[[], Awaitable[Place]],
        token: bytes,
        *,
        on_failure: Callable[[BaseException], None],
        on_acknowledged: Callable[[int, list[bytes]], None] | None = None,
        on_connection: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._find = find
        self._token = token
        self._on_failure = on_failure
        self._on_acknowledged = on_acknowledged
        self._on_connection = on_connection
        self._queue: deque[bytes] = deque()
        self._unacknowledged: deque[list[bytes]] = deque()
        self._posted = 0
        self._messages_acknowledged = 0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._flush: asyncio.Handle | None = None
        self._paused = False
        self._connecting = self._connect()

    def post(self, message: bytes) -> int:
        """Queue a message. Returns its sequence number: this outbox numbers its messages from 0."""
        number = self._posted
        self._posted = number + 1
        self._queue.append(message)
        if self._flush is None and self._transport is not None and not self._paused:
            self._flush = self._loop.call_soon(self.flush)
        return number

    def __len__(self) -> int:
        """Messages that were not acknowledged yet."""
        return self._posted - self._messages_acknowledged

    def flush(self) -> None:
        """Send what is queued, as far as the connection accepts it."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        while self._queue and self._transport is not None and not self._paused:
            batch = self._next_batch()
            self._unacknowledged.append(batch)
            self._transport.write(_framed(batch))

    def _next_batch(self) -> list[bytes]:
        queue, batch, size = self._queue, list[bytes](), 0
        while queue and len(batch) < MAX_MESSAGES:
            size += len(queue[0])
            if batch and size > MAX_BYTES:
                break
            batch.append(queue.popleft())
        return batch

    # --- the connection

    def _connect(self) -> asyncio.Task[None]:
        task = self._loop.create_task(self._try_until_connected())
        task.add_done_callback(self._connecting_ended)
        return task

    async def _try_until_connected(self) -> None:
        attempt = 0
        while True:
            try:
                host, port = await self._find()
                async with asyncio.timeout(_CONNECT_S):
                    await self._loop.create_connection(lambda: _OutboundConnection(self), host, port)
            except OSError:  # a timeout is one, too
                if self._transport is not None:
                    return  # it was made at the last moment
                await asyncio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])
                attempt += 1
            else:
                return

    def _connecting_ended(self, connecting: asyncio.Task[None]) -> None:
        if not connecting.cancelled() and (error := connecting.exception()) is not None:
            self._on_failure(error)

    def connected(self, transport: asyncio.Transport) -> None:
        """A connection stands: authenticate, and send again what may have been lost with the last one."""
        keep_alive(transport)
        self._transport = transport
        self._paused = False
        transport.write(self._token)
        for batch in self._unacknowledged:
            transport.write(_framed(batch))
        self.flush()
        self._on_connection(True)

    def disconnected(self, transport: asyncio.Transport) -> None:
        """A connection broke: make another, if it was the one that stands."""
        if transport is not self._transport:
            return
        self._transport = None
        self._on_connection(False)
        self._connecting = self._connect()

    def frames_acknowledged(self, frames: int) -> None:
        """The receiver has handled this many further frames."""
        for _ in range(min(frames, len(self._unacknowledged))):
            batch = self._unacknowledged.popleft()
            first = self._messages_acknowledged
            self._messages_acknowledged = first + len(batch)
            if self._on_acknowledged:
                self._on_acknowledged(first, batch)

    def pause(self, paused: bool) -> None:
        """The connection's buffer is full, or has room again (back-pressure)."""
        self._paused = paused
        if not paused:
            self.flush()


class _OutboundConnection(asyncio.Protocol):
    """The sender's side of a connection."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._transport: asyncio.Transport
        self._frames_acknowledged = 0
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is none by name
        self._outbox.connected(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._outbox.disconnected(self._transport)

    def pause_writing(self) -> None:
        self._outbox.pause(True)

    def resume_writing(self) -> None:
        self._outbox.pause(False)

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        whole = len(data) - len(data) % 4
        self._buffer = data[whole:]
        if whole:
            acknowledged = int.from_bytes(data[whole - 4 : whole], "little")
            self._outbox.frames_acknowledged((acknowledged - self._frames_acknowledged) % (1 << 32))
            self._frames_acknowledged = acknowledged


class Inbox:
    """Where an actor receives messages.

    `receive` is handed the payload of each frame. It returns None when the frame is handled, or a future
    that is done when it is; frames are acknowledged in order, and never if the future fails. What
    `receive` raises goes to `on_failure`.
    """

    def __init__(
        self,
        receive: Callable[[bytes], asyncio.Future[None] | None],
        token: bytes,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.receive = receive
        self.token = token
        self.on_failure = on_failure
        self.no_senders = asyncio.Event()
        """Set while no sender that knows the token is connected."""
        self.no_senders.set()
        self._senders = 0
        self._server: asyncio.Server | None = None

    def count_senders(self, change: int) -> None:
        """A sender that knows the token has connected, 1, or has left, -1."""
        self._senders += change
        (self.no_senders.clear if self._senders else self.no_senders.set)()

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

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._transport: asyncio.Transport
        self._buffer = b""
        self._authenticated = False
        self._pending: deque[asyncio.Future[None]] = deque()
        self._failed = False
        """A frame could not be handled: neither it nor a later one is ever acknowledged here."""
        self._frames_handled = 0
        self._frames_acknowledged = 0
        self._ack_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        keep_alive(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._authenticated:
            self._inbox.count_senders(-1)
        self._pending.clear()
        if self._ack_timer is not None:
            self._ack_timer.cancel()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        at = 0
        if not self._authenticated:
            at = len(self._inbox.token)
            if len(buffer) < at:
                self._buffer = buffer
                return
            if not hmac.compare_digest(buffer[:at], self._inbox.token):
                self._transport.abort()
                return
            self._authenticated = True
            self._inbox.count_senders(1)
        while len(buffer) >= at + 4:
            length = int.from_bytes(buffer[at : at + 4], "little")
            if length > _FRAME_LIMIT:
                self._transport.abort()
                return
            if len(buffer) < at + 4 + length:
                break
            self._deliver(buffer[at + 4 : at + 4 + length])
            at += 4 + length
        self._buffer = buffer[at:]

    def _deliver(self, payload: bytes) -> None:
        try:
            handled = self._inbox.receive(payload)
        except Exception as error:  # our own fault: say so, rather than let messages go unanswered
            self._inbox.on_failure(error)
            self._transport.abort()
            return
        if self._failed:
            return
        if handled is None and not self._pending:
            self._frames_handled += 1
            if self._frames_handled - self._frames_acknowledged >= _ACK_FRAMES:
                self._acknowledge()
            elif self._ack_timer is None:
                self._ack_timer = asyncio.get_running_loop().call_later(_ACK_S, self._acknowledge)
        elif handled is None:  # acknowledged in order, after those that are still being handled
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            self._pending.append(done)
        else:
            self._pending.append(handled)
            handled.add_done_callback(self._pending_done)

    def _pending_done(self, _: asyncio.Future[None]) -> None:
        pending = self._pending
        before = self._frames_handled
        while pending and pending[0].done():
            if pending[0].cancelled() or pending[0].exception() is not None:
                self._failed = True
                pending.clear()
                break
            pending.popleft()
            self._frames_handled += 1
        if self._frames_handled != before:
            self._acknowledge()

    def _acknowledge(self) -> None:
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._frames_acknowledged = self._frames_handled
        self._transport.write((self._frames_handled % (1 << 32)).to_bytes(4, "little"))


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
