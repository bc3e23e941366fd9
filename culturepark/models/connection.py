"""A connection pool for HTTP/1.1: POST a body, get the response, over connections that are kept (keep-alive).

A model call is one small request and one small response, and a general client spends most of its time on
what such a call does not have: cookies, redirects, streams, traces, forms. Here a response is parsed as it
arrives (`httptools`, the parser of Node.js) and handed over whole. A connection carries one request at a
time (no pipelining). All that a server sends is bounded before it is kept: a head, interim responses
(status 1xx) among it, by `_HEAD_BYTES`; a body by the caller's cap, counted after it was decompressed, since
a small one can become huge; and the bytes received for one response by twice that cap, so that chunks of
one byte cannot go on for ever.
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
"""A response's head may have at most this many bytes."""
_KEEP_ALIVE_S = 30.0
"""A connection that was idle for this many seconds is closed: many servers have forgotten it by then."""
_ERROR_BODY_BYTES = 65_536
"""At most this many bytes of an error response's body are read."""
_ERROR_BODY_S = 5.0
"""The body of an error response is waited for at most this many seconds: the status says what matters."""
_MOST_PIECES = 64
"""A body that comes in more pieces is joined to one array after each read."""
_CHECK_EVERY_S = 1.0
"""Seconds between two checks of the deadlines, at most."""
_GZIP_OR_ZLIB = 47
"""The window size that lets zlib recognise either format by its header."""
_COMMON_HEADERS = b"Content-Type: application/json\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"


class HttpResponse(Struct):
    """A status and a body. With a status other than 200 the body may be cut short or missing."""

    status: int
    retry_after: str | None
    body: bytes


class NotHttpError(ValueError):
    """The bytes received are no HTTP response to this request."""


class TooLargeError(ValueError):
    """The response is larger than the cap."""


class NotSentError(OSError):
    """No byte of the request was sent, since no connection could be opened: no server can have billed it.
    `late`: not within the deadline (connect timeout)."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.late = isinstance(cause, TimeoutError)


class Address(Struct, frozen=True):
    """Where requests go, with the part of their head that is the same each time."""

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
        return cls(host, port, tls, raw + _COMMON_HEADERS + b"Content-Length: ")


class ConnectionPool:
    """Connections to any number of addresses. To be used within one event loop.

    `most_bytes` caps a body once it is decompressed; `deadline_s` is for a whole call, from connecting to
    the last byte. A timer for each call would cost as much as a third of it, so one timer checks all
    deadlines now and then, a twentieth of the deadline apart.
    """

    def __init__(self, most_bytes: int, deadline_s: float) -> None:
        self.most_bytes = most_bytes
        self.error_body_s = min(_ERROR_BODY_S, 0.5 * deadline_s)
        self._deadline_s = deadline_s
        self._check_every_s = min(_CHECK_EVERY_S, deadline_s / 20)
        self.busy: set[_Connection] = set()
        """Connections with a request under way, each with its `deadline_s`."""
        self._check: asyncio.TimerHandle | None = None
        self._idle: dict[Address, deque[_Connection]] = {}
        self._all: set[_Connection] = set()
        self._tls: ssl.SSLContext | None = None

    async def post(self, to: Address, body: bytes, extra: bytes = b"") -> HttpResponse:
        """The response to a request with this body. `extra` holds further header lines, each with its line
        break.

        Raises NotSentError if there is no connection; once there is, OSError, also for a response that
        broke off, TimeoutError (an OSError, too) past the deadline, NotHttpError, TooLargeError. A call that
        is cancelled closes its connection.
        """
        deadline_s = time.monotonic() + self._deadline_s
        connection = self._idle_connection(to)
        if connection is None:
            try:
                async with asyncio.timeout(self._deadline_s):
                    connection = await self._connect(to)
            except (OSError, UnicodeError) as error:  # no address can be made of some names
                raise NotSentError(error) from error
        return await connection.send(b"%b%d\r\n%b\r\n%b" % (to.head, len(body), extra, body), deadline_s)

    def watch(self, connection: _Connection) -> None:
        """Keep to the connection's deadline from now on."""
        self.busy.add(connection)
        if self._check is None:
            self._check = asyncio.get_running_loop().call_later(self._check_every_s, self._check_deadlines)

    def _check_deadlines(self) -> None:
        """End the requests that are past their deadline."""
        now_s = time.monotonic()
        for connection in [one for one in self.busy if one.deadline_s <= now_s]:
            connection.expire()
        self._check = None
        if self.busy:
            self._check = asyncio.get_running_loop().call_later(self._check_every_s, self._check_deadlines)

    def _idle_connection(self, to: Address) -> _Connection | None:
        idle = self._idle.get(to)
        oldest_s = time.monotonic() - _KEEP_ALIVE_S
        while idle:
            connection = idle.pop()
            if connection.idle_since_s < oldest_s:
                connection.close()
            elif not connection.closed:
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
        """A connection was made."""
        self._all.add(connection)

    def release(self, connection: _Connection) -> None:
        """Keep a connection for the next request; those that were idle for too long are closed."""
        idle = self._idle.setdefault(connection.to, deque())
        idle.append(connection)
        while idle[0].idle_since_s < connection.idle_since_s - _KEEP_ALIVE_S:
            idle.popleft().close()

    def lost(self, connection: _Connection) -> None:
        """A connection was closed."""
        self._all.discard(connection)  # if it is idle, `_idle_connection` passes over it

    async def close(self) -> None:
        """Close all connections."""
        if self._check is not None:
            self._check.cancel()
            self._check = None
        self._idle.clear()
        for connection in tuple(self._all):
            connection.close()
        await asyncio.sleep(0)  # so that sockets are closed before the loop may be


class _Connection(asyncio.Protocol):
    """One connection, with at most one request under way. The parser calls `on_...`."""

    def __init__(self, pool: ConnectionPool, to: Address, loop: asyncio.AbstractEventLoop) -> None:
        self.to = to
        self.idle_since_s = self.deadline_s = 0.0
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport
        self._response: asyncio.Future[HttpResponse] | None = None
        """Of the request under way."""
        self.closed = False
        # One for all responses of the connection, one after another.
        self._parser = httptools.HttpResponseParser(self)

    # --- a request

    async def send(self, request: bytes, deadline_s: float) -> HttpResponse:
        """The response to a request, by the deadline; as `ConnectionPool.post`."""
        if self.closed:
            raise NotSentError(ConnectionResetError("the server closed the connection"))
        self._response = response = self._loop.create_future()
        self._received = self._status = self._size = 0
        self._retry_after: str | None = None
        self._encoding, self._length = b"", -1
        self._delimited = self._complete = self._surplus = self._keep_alive = False
        self._parts: list[bytes | bytearray] = []
        self._inflate = None
        self._error_timer: asyncio.TimerHandle | None = None
        self.deadline_s = deadline_s
        self._pool.watch(self)
        self._transport.write(request)
        try:
            return await response
        except BaseException:
            if self._response is response:  # else it is over, and the next request may be under way by now
                self._end_request()
                self._transport.abort()
            raise

    def _end_request(self) -> asyncio.Future[HttpResponse] | None:
        """No request is under way any more; returns the future of its response. At once, and not when the
        waiting call runs again: the next request may begin before that."""
        response, self._response = self._response, None
        self._pool.busy.discard(self)
        if self._error_timer is not None:
            self._error_timer.cancel()
            self._error_timer = None
        return response

    def _finish(self, keep: bool) -> None:
        """Hand over the response as far as it is here."""
        response = self._end_request()
        if keep and not self.closed:
            self.idle_since_s = time.monotonic()
            self._pool.release(self)
        else:
            self._transport.abort()
        if response is not None and not response.done():
            response.set_result(HttpResponse(self._status, self._retry_after, b"".join(self._parts)))

    def _fail(self, error: Exception) -> None:
        """Give up; but an error response stays one, whatever becomes of its body."""
        if self._status and self._status != 200:
            self._finish(keep=False)
            return
        response = self._end_request()
        self._transport.abort()
        if response is not None and not response.done():
            response.set_exception(error)

    def expire(self) -> None:
        """The deadline has passed."""
        response = self._end_request()
        self._transport.abort()
        if response is not None and not response.done():
            response.set_exception(TimeoutError())

    def close(self) -> None:
        """End the connection."""
        self._transport.abort()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._pool.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._pool.lost(self)
        if self._response is None:
            return
        if self._status and not self._delimited and exc is None:  # its end is the end of the response
            self.on_message_complete()
            self._end_response()
        else:
            what = "the reply broke off" if self._received else "the server closed the connection"
            self._fail(ConnectionResetError(str(exc) if exc else what))

    def data_received(self, data: bytes) -> None:
        if self._response is None:
            # It would pass for the response to the next request, which may be another dialogue's.
            self._transport.abort()
            return
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(NotHttpError("it switches to another protocol"))
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__ or error.__cause__
            self._fail(cause if isinstance(cause, OSError | ValueError) else NotHttpError(str(error)))
        except httptools.HttpParserError as error:
            if not self._complete:
                self._fail(NotHttpError(str(error) or type(error).__name__))
            else:
                self._surplus = True
        if self._complete:
            self._end_response()
        else:
            self._check_size()

    def _check_size(self) -> None:
        if not self._status:
            if self._received > _HEAD_BYTES:
                self._fail(NotHttpError("its head has no end"))
        elif self._received > 2 * self._pool.most_bytes + _HEAD_BYTES:
            self._fail(TooLargeError())
        elif len(self._parts) > _MOST_PIECES:
            self._join_pieces()

    def _end_response(self) -> None:
        """The whole response is here."""
        if self._inflate is not None and not self._inflate.eof:
            self._fail(ConnectionResetError("the compressed reply broke off"))
        else:
            self._finish(keep=self._keep_alive and not self._surplus)

    # --- callbacks of the parser

    def on_message_begin(self) -> None:
        """A response begins, or one that no request asked for."""
        if self._complete:
            self._surplus = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer behind the body."""
        name = name.lower()
        if self._surplus:
            return
        if name == b"content-length":
            self._delimited = True
            try:
                self._length = int(value)
            except ValueError:  # it is no number, or one of thousands of digits
                raise NotHttpError("its Content-Length is none") from None
        elif name == b"transfer-encoding":
            self._delimited = b"chunked" in value.lower()
        elif name == b"content-encoding":
            self._encoding = value.strip().lower()
        elif name == b"retry-after":
            self._retry_after = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is complete."""
        status = self._parser.get_status_code()
        if self._surplus:
            return
        if 100 <= status < 200:  # an interim response: another head follows
            self._delimited, self._length, self._encoding = False, -1, b""
            return
        self._status = status
        if status != 200:
            self._error_timer = self._loop.call_later(self._pool.error_body_s, self._finish, False)
        elif self._length > self._pool.most_bytes:
            raise TooLargeError
        if self._encoding in (b"", b"identity"):
            return
        if self._encoding not in (b"gzip", b"x-gzip", b"deflate"):
            raise NotHttpError("its body is compressed in a way that was not asked for")
        self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._surplus or self._response is None:
            return
        most = self._pool.most_bytes if self._status == 200 else _ERROR_BODY_BYTES
        if self._inflate is not None:
            body = self._inflated(body, most + 1 - self._size)
        self._size += len(body)
        self._parts.append(body)
        if self._size <= most:
            return
        if self._status == 200:
            raise TooLargeError
        self._parts = [b"".join(self._parts)[:most]]
        self._finish(keep=False)

    def _join_pieces(self) -> None:
        """Join the pieces to one array: an object for each small chunk would need thirty times its room."""
        whole = self._parts[0]
        if isinstance(whole, bytes):
            whole = bytearray(whole)
        whole += b"".join(self._parts[1:])
        self._parts = [whole]

    def _inflated(self, body: bytes, room: int) -> bytes:
        """A piece, decompressed: at most `room` bytes of it."""
        out: list[bytes] = []
        while body and room > 0 and self._inflate is not None:
            if self._inflate.eof:  # another compressed stream follows
                self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
            try:
                out.append(self._inflate.decompress(body, room))
            except zlib.error as error:
                raise ConnectionError(f"the reply does not decompress: {error}") from None
            room -= len(out[-1])
            body = self._inflate.unused_data or self._inflate.unconsumed_tail
        return b"".join(out)

    def on_message_complete(self) -> None:
        """The response, or an interim one before it, is complete."""
        if self._status and not self._complete:
            self._complete = True
            self._keep_alive = not self.closed and bool(self._parser.should_keep_alive())
