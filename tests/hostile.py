"""An endpoint that does what no endpoint should: raw bytes on loopback, one misdeed for each name.

What a request meets is told by its dialogue's id: `<misdeed>` or `<misdeed>:<anything>`; any other id is
served well. So one address is good to some dialogues and bad to others at the same time.
"""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import json
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

STRAY = "This answers another question."
DRIP_S = 0.04
"""Between two bytes of a drip: far below any deadline, so that a limit for each read would never be met."""
_BLOCK = b" " * 65_536


def good(content: Any = "Hello.", **over: Any) -> dict[str, Any]:
    """A chat completion as it should be."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    details = {"cached_tokens": 4}
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": details}
    return {"model": "served-model", "choices": [choice], "usage": usage} | over


def framed(body: Any, status: str = "200 OK", *headers: str) -> bytes:
    """A whole response with its length."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"".join((_head(status, f"Content-Length: {len(raw)}", *headers), b"\r\n", raw))


def _head(status: str = "200 OK", *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", "Content-Type: application/json", *headers)
    return b"".join(line.encode() + b"\r\n" for line in lines)


@contextmanager
def full_backlog() -> Iterator[int]:
    """A port on loopback whose kernel answers no further attempt to connect, as a packet filter may."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield server.getsockname()[1]


class Peer:
    """The other end of one connection, with what it has just asked."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.headers: dict[str, str] = {}
        self.body = b""

    async def listen(self) -> bool:
        """Take one request; False at the end of the connection."""
        try:
            lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            self.headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines[1:])}
            self.body = await self._reader.readexactly(int(self.headers.get("content-length", "0")))
        except (asyncio.IncompleteReadError, ConnectionError):
            return False
        return True

    async def say(self, *parts: bytes) -> None:
        """Send this, as fast as the other end reads."""
        self._writer.writelines(parts)
        await self._writer.drain()

    async def drip(self, data: bytes) -> None:
        """Send this byte by byte."""
        for byte in data:
            await self.say(bytes((byte,)))
            await asyncio.sleep(DRIP_S)

    async def hang(self) -> None:
        """Say nothing until the other end goes away."""
        await self._reader.read()

    def reset(self) -> None:
        """End the connection as a crashed host does."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def close(self) -> None:
        """End the connection in good order."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


Misdeed = Callable[[Peer], Awaitable[None]] | bytes
"""What happens to a request; after bytes the connection stays open for more, else it is closed."""


def sends(*parts: bytes, then: str = "close") -> Misdeed:
    """These bytes, and then `close`, `hang` or `reset`."""

    async def act(peer: Peer) -> None:
        await peer.say(*parts)
        if then == "hang":
            await peer.hang()
        elif then == "reset":
            await asyncio.sleep(0.02)  # else the bytes are lost with the connection
            peer.reset()

    return act


def forever(start: bytes, block: bytes) -> Misdeed:
    """These bytes, and then the block again and again."""

    async def act(peer: Peer) -> None:
        await peer.say(start)
        while True:
            await peer.say(block)

    return act


def dripping(start: bytes, byte: bytes) -> Misdeed:
    """These bytes, and then one byte now and then, for ever."""

    async def act(peer: Peer) -> None:
        await peer.say(start)
        while True:
            await peer.drip(byte)

    return act


async def late_stray(peer: Peer) -> None:
    """A good reply, and a little behind it another that no request asked for."""
    await peer.say(framed(good()))
    await asyncio.sleep(0.02)
    await peer.say(framed(good(STRAY)))
    await peer.hang()


def echo(status: str) -> Misdeed:
    """Shows all it was sent, key included, in every place of the response."""

    async def act(peer: Peer) -> None:
        secret = peer.headers.get("authorization", "")
        await peer.say(framed({"error": {"message": secret}}, f"{status} {secret}", f"X-Seen: {secret}"))

    return act


def no_http(before: int) -> Misdeed:
    """No response at all, but the key behind so many other characters."""

    async def act(peer: Peer) -> None:
        await peer.say(b"x" * before, peer.headers.get("authorization", "").encode(), b"\r\n\r\n")

    return act


def _deflated(block: bytes, times: int, wbits: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return b"".join([*(packer.compress(block) for _ in range(times)), packer.flush()])


def _with_content(text: bytes) -> bytes:
    return b'{"choices": [{"message": {"content": "%s"}, "finish_reason": "stop"}]}' % text


def _stuffed(field: bytes, piece: bytes, size: int = 4_000_000) -> bytes:
    """A reply as large as is let through, nearly all of it many small values in one field."""
    many = b",".join([piece] * (size // (len(piece) + 1)))
    return _with_content(b"Hello.")[:-1] + b', "%s": [%s]}' % (field, many)


_CHUNKED = _head("200 OK", "Transfer-Encoding: chunked") + b"\r\n"
_PLAIN = _head("200 OK", "Connection: close") + b"\r\n"
_GZIP = ("200 OK", "Content-Encoding: gzip")
_BOMB = _deflated(bytes(1 << 20), 64, 31)
_GOOD = json.dumps(good()).encode()
_OPEN = b'{"choices": [{"message": {"content": "'

RETRY_AFTER = {
    "absent": None,
    "zero": "0",
    "negative": "-1",
    "date": email.utils.formatdate(time.time() + 1, usegmt=True),
    "past": "Thu, 01 Jan 1970 00:00:00 GMT",
    "far": "Fri, 31 Dec 9999 23:59:59 GMT",
    "billion": "1e9",
    "soon": "soon",
    "nan": "nan",
    "long": "9" * 5000,
}
"""What a 429 asks for, by the end of its misdeed's name."""

MISDEEDS: dict[str, tuple[Misdeed, str]] = {
    # How each ends: the kind of ModelError, or "" for a good completion.
    **{
        f"429-{name}": (
            framed({"error": "slow down"}, "429 Busy", *([f"Retry-After: {value}"] if value else [])),
            "rate_limited",
        )
        for name, value in RETRY_AFTER.items()
    },
    "500": (framed(b"<html>Oh no</html>", "500 Oh No"), "server"),
    "502": (framed(b"<html>bad gateway</html>", "502 Bad Gateway"), "server"),
    "504": (framed(b"<html>gateway timeout</html>", "504 Gateway Timeout"), "server"),
    "524": (framed(b"", "524 A Timeout Occurred"), "server"),
    "503": (framed({"error": {"message": "loading"}}, "503 Wait", "Retry-After: 86400"), "server"),
    "400-format": (framed({"error": {"message": "no response_format here"}}, "400 No"), "bad_request"),
    "401": (framed({"error": {"message": "expired"}}, "401 No"), "unauthorised"),
    "402": (framed({"error": {"message": "Insufficient credits"}}, "402 Pay"), "unauthorised"),
    "403": (framed({"error": {"message": "moderation"}}, "403 No"), "forbidden"),
    "404": (framed({"error": {"message": "no such model"}}, "404 No"), "no_such_model"),
    # A status that is known is not forgotten for what becomes of the body.
    "401-cut": (sends(_head("401 No", "Content-Length: 1000"), b'\r\n{"error'), "unauthorised"),
    "401-drips": (dripping(_head("401 No", "Content-Length: 1000") + b"\r\n", b" "), "unauthorised"),
    "401-reset": (
        sends(_head("401 No", "Content-Length: 9000"), b'\r\n{"er', then="reset"),
        "unauthorised",
    ),
    "404-bad-gzip": (
        framed(b"no gzip", "404 No", "Content-Encoding: gzip"),
        "no_such_model",
    ),
    "429-huge": (framed(b"x" * 10_000_000, "429 Busy", "Retry-After: 7"), "rate_limited"),
    "500-endless": (forever(_head("500 Oh No") + b"\r\n", _BLOCK), "server"),
    "500-stuffed": (
        framed(b'{"error":[' + b",".join([b"[]"] * 1_300_000) + b"]}", "500 Oh No"),
        "server",
    ),
    # Silence and drips
    "never": (sends(then="hang"), "timeout"),
    "half-a-head": (sends(b"HTTP/1.1 200 OK\r\nContent-Ty", then="hang"), "timeout"),
    "half-a-body": (sends(_head("200 OK", "Content-Length: 90"), b"\r\n", _OPEN, then="hang"), "timeout"),
    "drip-body": (dripping(_PLAIN + _OPEN, b"a"), "timeout"),
    "drip-head": (dripping(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"a"), "timeout"),
    "drip-chunk-size": (dripping(_CHUNKED, b"0"), "timeout"),
    "drip-chunks": (dripping(_CHUNKED, b"1\r\n \r\n"), "timeout"),
    "interim-slow": (dripping(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"), "timeout"),
    # Without end
    "endless-plain": (forever(_PLAIN + _OPEN, _BLOCK), "too_large"),
    "endless-chunked": (forever(_CHUNKED, b"10000\r\n" + _BLOCK + b"\r\n"), "too_large"),
    "endless-crumbs": (forever(_CHUNKED, b"1\r\n \r\n" * 10_000), "*"),
    "endless-two-byte-crumbs": (forever(_CHUNKED, b"2\r\n  \r\n" * 10_000), "*"),
    "endless-chunk": (forever(_CHUNKED + b"ffffffffffff\r\n", _BLOCK), "too_large"),
    "endless-length": (
        forever(_head("200 OK", "Content-Length: 99999999999999") + b"\r\n", _BLOCK),
        "too_large",
    ),
    "endless-gzip": (
        forever(_head(*_GZIP, "Connection: close") + b"\r\n", gzip.compress(bytes(1 << 20), 9)),
        "too_large",
    ),
    "endless-headers": (forever(_head(), b"X-More: and more\r\n" * 1000), "*"),
    "endless-header": (forever(_head() + b"X-Long: ", _BLOCK), "*"),
    "endless-status": (forever(b"HTTP/1.1 200 ", _BLOCK), "*"),
    "endless-chunk-extension": (forever(_CHUNKED + b"5;", b"a" * 65_536), "*"),
    "endless-trailers": (forever(_CHUNKED + b"1\r\n \r\n0\r\n", b"X-More: and more\r\n" * 1000), "*"),
    "endless-interim": (forever(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 100), "*"),
    # Cut short
    "reset": (sends(then="reset"), "connection"),
    "reset-in-head": (sends(b"HTTP/1.1 200 OK\r\nConte", then="reset"), "connection"),
    "reset-in-body": (
        sends(_head("200 OK", "Content-Length: 9000"), b"\r\n", _OPEN, then="reset"),
        "connection",
    ),
    "cut-length": (sends(_head("200 OK", "Content-Length: 9000"), b"\r\n", _OPEN), "connection"),
    "cut-no-length": (sends(_PLAIN, _OPEN), "invalid_reply"),
    "cut-chunked": (sends(_CHUNKED, b"5\r\n{'cho"), "connection"),
    "cut-gzip": (framed(gzip.compress(json.dumps(good()).encode())[:-12], *_GZIP), "*"),
    "closed": (sends(), "connection"),
    # Large
    "300-kb-of-text": (framed(good("x" * 300_000)), "too_large"),
    "10-mb": (framed(good("x" * 10_000_000)), "too_large"),
    "gzip-bomb": (framed(_BOMB, *_GZIP), "too_large"),
    "gzip-bomb-chunked": (
        sends(_CHUNKED[:-2], b"Content-Encoding: gzip\r\n\r\n", b"%x\r\n" % len(_BOMB), _BOMB),
        "too_large",
    ),
    "deflate-bomb": (
        framed(_deflated(bytes(1 << 20), 64, 15), "200 OK", "Content-Encoding: deflate"),
        "too_large",
    ),
    "gzip-twice": (framed(gzip.compress(_BOMB, 9), "200 OK", "Content-Encoding: gzip, gzip"), "*"),
    "brotli": (framed(b"\x8f\x0b\x80{}\x03", "200 OK", "Content-Encoding: br"), "*"),
    "zstd": (framed(b"\x28\xb5\x2f\xfd", "200 OK", "Content-Encoding: zstd"), "*"),
    "stuffed-choices": (
        framed(b'{"choices":[' + b",".join([b'{"message":{}}'] * 260_000) + b"]}"),
        "empty_reply",
    ),
    "stuffed-unknown": (framed(_stuffed(b"more", b"[]")), ""),
    "stuffed-usage": (framed(_stuffed(b"usage", b"[]")), "*"),
    "stuffed-count": (
        framed(
            _with_content(b"Hello.")[:-1]
            + b', "usage": {"prompt_tokens": ['
            + b",".join([b"[]"] * 1_300_000)
            + b"]}}"
        ),
        "",
    ),
    # Bodies that are no replies
    "empty": (framed(b""), "invalid_reply"),
    "no-json": (framed(b"{'choices': []}"), "invalid_reply"),
    "nested": (framed(b"[" * 1_000_000), "invalid_reply"),
    "nested-in-unknown": (framed(b'{"more":' + b'{"a":' * 500_000), "invalid_reply"),
    "no-choices": (framed(good(choices=[])), "invalid_reply"),
    "null-content": (framed(good(None)), "empty_reply"),
    "refusal": (framed(good(choices=[{"message": {"content": None, "refusal": "I cannot."}}])), "refused"),
    "content-filter": (
        framed(good(choices=[{"message": {"content": "A"}, "finish_reason": "content_filter"}])),
        "refused",
    ),
    "length": (framed(good(choices=[{"message": {"content": "Hel"}, "finish_reason": "length"}])), ""),
    "bad-utf8": (framed(_with_content(b"\xff\xfe\xc3")), "invalid_reply"),
    "surrogate": (framed(_with_content(b"a\\ud800b")), "invalid_reply"),
    "nul": (framed(_with_content(b"a\\u0000b")), ""),
    "raw-nul": (framed(_with_content(b"a\0b")), "invalid_reply"),
    # No HTTP, or twice as much as was asked for
    "banner": (sends(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "invalid_reply"),
    "nul-header": (sends(_head() + b"X-Nul: a\0b\r\n\r\n"), "invalid_reply"),
    "two-lengths": (
        sends(_head("200 OK", "Content-Length: 5", "Content-Length: 6"), b"\r\n{}"),
        "invalid_reply",
    ),
    "length-of-5000-digits": (sends(_head("200 OK", f"Content-Length: {'9' * 5000}"), b"\r\n{}"), "*"),
    "length-of-zeros": (
        sends(_head("200 OK", f"Content-Length: {'0' * 5000}2"), b"\r\n{}"),
        "invalid_reply",
    ),
    "length-in-a-trailer": (
        sends(_CHUNKED, b"%x\r\n%b\r\n0\r\nContent-Length: x\r\n\r\n" % (len(_GOOD), _GOOD)),
        "*",
    ),
    "negative-length": (sends(_head("200 OK", "Content-Length: -5"), b"\r\n{}"), "invalid_reply"),
    "bad-chunk-size": (sends(_CHUNKED, b"xyz\r\n{}\r\n0\r\n\r\n"), "*"),
    "switching": (sends(_head("101 Switching", "Upgrade: x", "Connection: upgrade"), b"\r\n"), "*"),
    "redirect": (framed(b"", "307 There", "Location: http://127.0.0.1:9/"), "bad_request"),
    "redirect-nowhere": (framed(b"", "302 There", "Location: ://[\0"), "*"),
    "status-999": (framed(b"", "999 What"), "*"),
    "status-099": (framed(b"", "099 What"), "*"),
    "cookies": (framed(good(), "200 OK", *(f"Set-Cookie: a{i}={'b' * 60}" for i in range(50))), ""),
    "stray": (framed(good()) + framed(good(STRAY)), ""),
    "stray-late": (late_stray, ""),
    **{f"echo-{status}": (echo(status), "*") for status in ("200", "400", "401", "500")},
    **{f"no-http-{n}": (no_http(n), "*") for n in range(0, 120, 7)},
}
"""What each name does, and the kind of ModelError that a call ends in with it: "" for a good completion,
"*" for any one kind."""


class Hostile:
    """The server. `met` counts requests by dialogue, `open` the connections there are now.

    `turns` says which misdeed the requests of a dialogue meet one after the other, the last for ever;
    `rule` may decide for every request instead, by how many came before. `answer` makes the response to
    requests that are served well; with `once` the connection ends behind it.
    """

    def __init__(self) -> None:
        self.url = ""
        self.open = 0
        self.met: Counter[str] = Counter()
        self.turns: dict[str, list[str]] = {}
        self.rule: Callable[[int], str] | None = None
        self.answer: Callable[[bytes], bytes] | None = None
        self.once = False

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Hostile]:
        """Serve until the block ends."""
        tasks: set[asyncio.Task[Any]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            self.open += 1
            try:
                await self._serve(Peer(reader, writer))
            except (ConnectionError, asyncio.CancelledError):
                writer.transport.abort()
            finally:
                self.open -= 1
                tasks.discard(task)

        server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 20)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield self
        finally:
            server.close()
            for task in tuple(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, peer: Peer) -> None:
        while await peer.listen():
            dialogue = peer.headers.get("x-session-id", "")
            misdeed = self._misdeed(dialogue, self.met.total())
            self.met[dialogue] += 1
            if misdeed is None:
                await peer.say(self.answer(peer.body) if self.answer else framed(good()))
                if self.once:
                    await peer.close()
                    return
            elif isinstance(misdeed, bytes):
                await peer.say(misdeed)
            else:
                await misdeed(peer)
                await peer.close()
                return

    def _misdeed(self, dialogue: str, before: int) -> Misdeed | None:
        if self.rule is not None:
            name = self.rule(before)
        elif queue := self.turns.get(dialogue):
            name = queue.pop(0) if len(queue) > 1 else queue[0]
        else:
            name = dialogue.partition(":")[0]
        found = MISDEEDS.get(name)
        return found[0] if found else None
