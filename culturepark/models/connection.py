"""HTTP/1.1 for the hot path: POST a body, get the answer, over connections that are kept.

A model call is one small request and one small reply, and a general client spends most of its time on
what such a call does not have: cookies, redirects, streams, traces, forms. Here a reply is parsed as it
arrives (`httptools`, the parser of Node.js) and handed over whole. All that a server sends is bounded
before it is kept: a head, interim heads among it, by `_HEAD_BYTES`; a body by the caller's cap, counted
after it was decompressed, since a small one can become huge; and what goes over the wire by twice that
cap, so that crumbs of one byte cannot go on.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import zlib
from collections import deque
from collections.abc import Mapping
from typing import cast

import httptools
from msgspec import Struct
from yarl import URL

_HEAD_BYTES = 65_536
_KEPT_S = 30.0
"""A connection that was idle for longer is closed: many servers and routers have forgotten it by then."""
_WORDS_BYTES = 65_536
"""No more of the body of a refusal than this is looked at."""
_WORDS_S = 5.0
"""The body of a refusal is not waited for longer than this: the status says what matters."""
_PIECES = 64
"""Of a body that comes in more pieces than this, one array is made after each read."""
_LOOK_S = 1.0
_GZIP_OR_ZLIB = 47
_GIVEN = b"Content-Type: application/json\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"


class Answer(Struct):
    """What came back. Of a status other than 200 the body may be cut short or missing."""

    status: int
    retry_after: str | None
    body: bytes


class NotHttpError(ValueError):
    """What came is not HTTP as it was asked for."""


class TooLargeError(ValueError):
    """The answer is larger than the cap."""


class NotSentError(OSError):
    """No byte of the request went out, since no connection came about: nobody can have answered it.
    `late`: not within the deadline."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.late = isinstance(cause, TimeoutError)


class Address(Struct, frozen=True):
    """Where to send, with all of the request's head that is the same each time."""

    host: str
    port: int
    tls: bool
    head: bytes

    @classmethod
    def of(cls, url: str, headers: Mapping[str, str]) -> Address:
        """For this URL. Raises ValueError if it has no host, or a header cannot stand in a request."""
        parsed = URL(url)
        host, port, tls = parsed.raw_host, parsed.port, parsed.scheme == "https"
        if not host or port is None:
            raise ValueError(f"{url!r} has no host")
        shown = f"[{host}]" if ":" in host else host
        if not parsed.is_default_port():
            shown += f":{port}"
        lines = [f"POST {parsed.raw_path_qs} HTTP/1.1", f"Host: {shown}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if any("\r" in line or "\n" in line or "\0" in line for line in lines):
            raise ValueError("a header holds a line break")
        raw = "".join(f"{line}\r\n" for line in lines).encode("utf-8")
        return cls(host, port, tls, raw + _GIVEN + b"Content-Length: ")


class ConnectionPool:
    """Connections to any number of addresses. To be used within one event loop.

    `most_bytes` caps a body once it is decompressed; `deadline_s` is for a whole call, from connecting to
    the last byte. A timer for each call would cost as much as a third of it, so one look now and then, a
    twentieth of the deadline apart, is for all of them.
    """

    def __init__(self, most_bytes: int, deadline_s: float) -> None:
        self.most_bytes = most_bytes
        self.words_s = min(_WORDS_S, 0.5 * deadline_s)
        self._deadline_s = deadline_s
        self._look_s = min(_LOOK_S, deadline_s / 20)
        self.owing: set[_Connection] = set()
        """Connections that are to answer, each by its `due_s`."""
        self._looking: asyncio.TimerHandle | None = None
        self._idle: dict[Address, deque[_Connection]] = {}
        self._all: set[_Connection] = set()
        self._tls: ssl.SSLContext | None = None

    async def post(self, to: Address, body: bytes, extra: bytes = b"") -> Answer:
        """The answer to a body. `extra` holds further lines of the head, each with its line break.

        Raises NotSentError if there is no connection; once there is, OSError, also for an answer that
        broke off, TimeoutError (an OSError, too) past the deadline, NotHttpError, TooLargeError. A call that
        is cancelled closes its connection.
        """
        due_s = time.monotonic() + self._deadline_s
        connection = self._kept(to)
        if connection is None:
            try:
                async with asyncio.timeout(self._deadline_s):
                    connection = await self._connect(to)
            except (OSError, UnicodeError) as error:  # no address can be made of some names
                raise NotSentError(error) from error
        return await connection.ask(b"%b%d\r\n%b\r\n%b" % (to.head, len(body), extra, body), due_s)

    def asked(self, connection: _Connection) -> None:
        """It is to answer by its `due_s`."""
        self.owing.add(connection)
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def _look(self) -> None:
        """End what is past its deadline."""
        now_s = time.monotonic()
        for connection in [one for one in self.owing if one.due_s <= now_s]:
            connection.expire()
        self._looking = None
        if self.owing:
            self._looking = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def _kept(self, to: Address) -> _Connection | None:
        idle = self._idle.get(to)
        least_s = time.monotonic() - _KEPT_S
        while idle:
            connection = idle.pop()
            if connection.idle_s < least_s:
                connection.close()
            elif not connection.gone:
                return connection
        return None

    async def _connect(self, to: Address) -> _Connection:
        loop = asyncio.get_running_loop()
        context: ssl.SSLContext | None = None
        if to.tls:
            context = self._tls = self._tls or ssl.create_default_context()
        _, connection = await loop.create_connection(
            lambda: _Connection(self, to, loop), to.host, to.port, ssl=context
        )
        return connection

    def opened(self, connection: _Connection) -> None:
        """A connection stands."""
        self._all.add(connection)

    def keep(self, connection: _Connection) -> None:
        """It may be used again; those that were idle for too long are let go."""
        idle = self._idle.setdefault(connection.to, deque())
        idle.append(connection)
        while idle[0].idle_s < connection.idle_s - _KEPT_S:
            idle.popleft().close()

    def lost(self, connection: _Connection) -> None:
        """It is no more."""
        self._all.discard(connection)  # if it is kept, `_kept` passes over it

    async def close(self) -> None:
        """Close all connections."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        self._idle.clear()
        for connection in tuple(self._all):
            connection.close()
        await asyncio.sleep(0)  # so that sockets are closed before the loop may be


class _Connection(asyncio.Protocol):
    """One connection, with at most one question on it at a time. The parser calls `on_...`."""

    def __init__(self, wire: ConnectionPool, to: Address, loop: asyncio.AbstractEventLoop) -> None:
        self.to = to
        self.idle_s = self.due_s = 0.0
        self._wire = wire
        self._loop = loop
        self._transport: asyncio.Transport
        self._answer: asyncio.Future[Answer] | None = None
        self.gone = False
        self._parser = httptools.HttpResponseParser(
            self
        )  # of one reply after another, as long as all is well

    # --- asking

    async def ask(self, request: bytes, due_s: float) -> Answer:
        """The answer to a request, by then; as `Wire.post`."""
        if self.gone:
            raise NotSentError(ConnectionResetError("the server closed the connection"))
        self._answer = answer = self._loop.create_future()
        self._wired = self._status = self._size = 0
        self._retry_after: str | None = None
        self._encoding, self._length = b"", -1
        self._framed = self._over = self._stray = self._lasting = False
        self._parts: list[bytes | bytearray] = []
        self._inflate = None
        self._waiting: asyncio.TimerHandle | None = None
        self.due_s = due_s
        self._wire.asked(self)
        self._transport.write(request)
        try:
            return await answer
        except BaseException:
            if self._answer is answer:  # else it is over, and another may be asking here by now
                self._over_with()
                self._transport.abort()
            raise

    def _over_with(self) -> asyncio.Future[Answer] | None:
        """Owe no answer any more; returns who waits for one. At once, and not when that one goes on: another
        may ask before that."""
        answer, self._answer = self._answer, None
        self._wire.owing.discard(self)
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        return answer

    def _settle(self, keep: bool) -> None:
        """Hand over what there is."""
        answer = self._over_with()
        if keep and not self.gone:
            self.idle_s = time.monotonic()
            self._wire.keep(self)
        else:
            self._transport.abort()
        if answer is not None and not answer.done():
            answer.set_result(Answer(self._status, self._retry_after, b"".join(self._parts)))

    def _fail(self, error: Exception) -> None:
        """Give up; but a refusal stays a refusal, whatever becomes of its body."""
        if self._status and self._status != 200:
            self._settle(keep=False)
            return
        answer = self._over_with()
        self._transport.abort()
        if answer is not None and not answer.done():
            answer.set_exception(error)

    def expire(self) -> None:
        """The answer has not come in time."""
        answer = self._over_with()
        self._transport.abort()
        if answer is not None and not answer.done():
            answer.set_exception(TimeoutError())

    def close(self) -> None:
        """End the connection."""
        self._transport.abort()

    # --- the protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._wire.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self._wire.lost(self)
        if self._answer is None:
            return
        if self._status and not self._framed and exc is None:  # its end is the end of the answer
            self.on_message_complete()
            self._end()
        else:
            what = "the reply broke off" if self._wired else "the server closed the connection"
            self._fail(ConnectionResetError(str(exc) if exc else what))

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            # It would be taken for the answer to the next question, which may be another dialogue's.
            self._transport.abort()
            return
        self._wired += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(NotHttpError("it switches to another protocol"))
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__ or error.__cause__
            self._fail(cause if isinstance(cause, OSError | ValueError) else NotHttpError(str(error)))
        except httptools.HttpParserError as error:
            if not self._over:
                self._fail(NotHttpError(str(error) or type(error).__name__))
            else:
                self._stray = True
        if self._over:
            self._end()
        else:
            self._check_size()

    def _check_size(self) -> None:
        if not self._status:
            if self._wired > _HEAD_BYTES:
                self._fail(NotHttpError("its head has no end"))
        elif self._wired > 2 * self._wire.most_bytes + _HEAD_BYTES:
            self._fail(TooLargeError())
        elif len(self._parts) > _PIECES:
            self._gather()

    def _end(self) -> None:
        """The whole answer is here."""
        if self._inflate is not None and not self._inflate.eof:
            self._fail(ConnectionResetError("the compressed reply broke off"))
        else:
            self._settle(keep=self._lasting and not self._stray)

    # --- the parser

    def on_message_begin(self) -> None:
        """A reply begins, or one too many."""
        if self._over:
            self._stray = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of the head, or one behind the body."""
        name = name.lower()
        if self._stray:
            return
        if name == b"content-length":
            self._framed = True
            try:
                self._length = int(value)
            except ValueError:  # it is no number, or one of thousands of digits
                raise NotHttpError("its Content-Length is none") from None
        elif name == b"transfer-encoding":
            self._framed = b"chunked" in value.lower()
        elif name == b"content-encoding":
            self._encoding = value.strip().lower()
        elif name == b"retry-after":
            self._retry_after = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is whole."""
        status = self._parser.get_status_code()
        if self._stray:
            return
        if 100 <= status < 200:  # another head follows
            self._framed, self._length, self._encoding = False, -1, b""
            return
        self._status = status
        if status != 200:
            self._waiting = self._loop.call_later(self._wire.words_s, self._settle, False)
        elif self._length > self._wire.most_bytes:
            raise TooLargeError
        if self._encoding in (b"", b"identity"):
            return
        if self._encoding not in (b"gzip", b"x-gzip", b"deflate"):
            raise NotHttpError("its body is compressed in a way that was not asked for")
        self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._stray or self._answer is None:
            return
        most = self._wire.most_bytes if self._status == 200 else _WORDS_BYTES
        if self._inflate is not None:
            body = self._inflated(body, most + 1 - self._size)
        self._size += len(body)
        self._parts.append(body)
        if self._size <= most:
            return
        if self._status == 200:
            raise TooLargeError
        self._parts = [b"".join(self._parts)[:most]]
        self._settle(keep=False)

    def _gather(self) -> None:
        """Make one array of the pieces: an object for each crumb would take thirty times its room."""
        whole = self._parts[0]
        if isinstance(whole, bytes):
            whole = bytearray(whole)
        whole += b"".join(self._parts[1:])
        self._parts = [whole]

    def _inflated(self, body: bytes, room: int) -> bytes:
        """What a piece holds, and no more than there is room for."""
        out: list[bytes] = []
        while body and room > 0 and self._inflate is not None:
            if self._inflate.eof:  # one compressed text behind another
                self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
            try:
                out.append(self._inflate.decompress(body, room))
            except zlib.error as error:
                raise ConnectionError(f"the reply does not decompress: {error}") from None
            room -= len(out[-1])
            body = self._inflate.unused_data or self._inflate.unconsumed_tail
        return b"".join(out)

    def on_message_complete(self) -> None:
        """The reply, or a head before it, is over."""
        if self._status and not self._over:
            self._over = True
            self._lasting = not self.gone and bool(self._parser.should_keep_alive())
