"""The connection pool of model calls: what it sends, what it keeps, and over TLS."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from culturepark.models.connection import (
    Address,
    ConnectionPool,
    HttpResponse,
    NotHttpError,
    NotSentError,
    TooLargeError,
)
from tests.hostile import full_backlog

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n%b\r\nhi"


class Seen:
    """What a server was sent, and over how many connections."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.connections = 0


@asynccontextmanager
async def serving(
    answer: Callable[[int], bytes], tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[str, Seen]]:
    """A server that answers the nth request so, and closes after a response without a length."""
    seen = Seen()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
                seen.requests.append(head + await reader.readexactly(length))
                raw = answer(len(seen.requests))
                writer.write(raw)
                await writer.drain()
                if b"Content-Length" not in raw and b"chunked" not in raw:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    server = await asyncio.start_server(meet, "127.0.0.1", 0, ssl=tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"{'https' if tls else 'http'}://localhost:{port}", seen


async def test_a_connection_is_used_again_and_the_request_is_whole() -> None:
    async with serving(lambda n: OK % b"") as (url, seen):
        pool = ConnectionPool(1000, 5.0)
        to = Address.of(f"{url}/v1/chat?a=b", {"Authorization": "Bearer key", "X-Team": "ünit"})
        for body in (b"{}", b'{"a": 1}'):
            response = await pool.post(to, body, b"X-Session-ID: d1\r\n")
            assert (response.status, response.body) == (200, b"hi")
        await pool.close()
    assert seen.connections == 1
    head, _, body = seen.requests[1].partition(b"\r\n\r\n")
    assert body == b'{"a": 1}'
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/chat?a=b HTTP/1.1"
    port = url.rsplit(":", 1)[1].encode()
    for line in (b"Host: localhost:" + port, b"Authorization: Bearer key", b"X-Session-ID: d1"):
        assert lines.count(line) == 1


@pytest.mark.parametrize("closing", [b"Connection: close\r\n", b""])
async def test_a_connection_that_the_server_ends_is_not_used_again(closing: bytes) -> None:
    whole = OK % closing if closing else b"HTTP/1.1 200 OK\r\n\r\nhi"
    async with serving(lambda n: whole) as (url, seen):
        pool, to = ConnectionPool(1000, 5.0), Address.of(url, {})
        for _ in range(3):
            assert (await pool.post(to, b"{}")).body == b"hi"
        await pool.close()
    assert seen.connections == 3


async def test_many_at_once_have_a_connection_each_and_keep_them() -> None:
    async with serving(lambda n: OK % b"") as (url, seen):
        pool, to = ConnectionPool(1000, 5.0), Address.of(url, {})
        for _ in range(3):
            await asyncio.gather(*(pool.post(to, b"{}") for _ in range(20)))
        await pool.close()
    assert seen.connections == 20
    assert len(seen.requests) == 60


async def test_bodies_in_chunks_and_compressed() -> None:
    packed = gzip.compress(b"a" * 500) + gzip.compress(b"b" * 400)
    chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in packed) + b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Encoding: GZip\r\n\r\n"
    interim = b"HTTP/1.1 103 Early Hints\r\nContent-Encoding: br\r\n\r\n"
    async with serving(lambda n: interim + head + chunked) as (url, seen):
        pool, to = ConnectionPool(900, 5.0), Address.of(url, {})
        for _ in range(2):
            assert (await pool.post(to, b"{}")).body == b"a" * 500 + b"b" * 400
        await pool.close()
        narrow = ConnectionPool(899, 5.0)
        with pytest.raises(TooLargeError):
            await narrow.post(to, b"{}")
        await narrow.close()
    assert seen.connections == 2


async def test_an_encoding_that_no_request_asked_for() -> None:
    async with serving(lambda n: OK % b"Content-Encoding: br\r\n") as (url, _):
        pool = ConnectionPool(1000, 5.0)
        with pytest.raises(NotHttpError, match="compressed"):
            await pool.post(Address.of(url, {}), b"{}")
        await pool.close()


async def test_a_call_past_its_deadline_ends_and_the_others_go_on() -> None:
    slow = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi"
    async with serving(lambda n: slow) as (url, _), serving(lambda n: OK % b"") as (quick, _):
        pool = ConnectionPool(1000, 0.2)
        late = asyncio.create_task(pool.post(Address.of(url, {}), b"{}"))
        while not late.done():
            assert (await pool.post(Address.of(quick, {}), b"{}")).body == b"hi"
            await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await late
        await pool.close()


async def test_a_call_that_is_cancelled_closes_its_connection() -> None:
    async with serving(lambda n: b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi") as (url, seen):
        pool, to = ConnectionPool(1000, 5.0), Address.of(url, {})
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await pool.post(to, b"{}")
        await pool.close()
    assert seen.connections == 2


async def test_a_connection_that_is_used_again_at_once_waits_for_the_next_response_alone() -> None:
    """The first call has not gone on yet when the second request is sent."""
    busy = b"HTTP/1.1 429 Busy\r\nContent-Length: 2\r\n\r\nno"
    answers = [busy, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi"]
    async with serving(lambda n: answers[n - 1]) as (url, seen):
        pool, to = ConnectionPool(1000, 0.6), Address.of(url, {})
        asked: list[asyncio.Task[HttpResponse]] = []
        release = pool.release

        def release_and_ask(connection: Any) -> None:
            release(connection)
            asked.append(asyncio.create_task(pool.post(to, b"{}")))

        pool.release = release_and_ask
        assert (await pool.post(to, b"{}")).status == 429
        with pytest.raises(TimeoutError):  # and it has its own deadline
            await asyncio.wait_for(asked[0], 5)
        await pool.close()
    assert seen.connections == 1


@pytest.mark.parametrize(
    "length", [b"9" * 5000, b"0" * 5000 + b"2", b"99999999999999999999999", b"two", b"-2", b"+2", b"2_0", b""]
)
async def test_a_length_that_is_none_is_no_http(length: bytes) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\nhi" % length
    async with serving(lambda n: raw) as (url, _):
        pool = ConnectionPool(1000, 1.0)
        with pytest.raises((NotHttpError, TooLargeError)):
            await pool.post(Address.of(url, {}), b"{}")
        await pool.close()


@pytest.mark.parametrize("crumb", [1, 2, 7])
async def test_a_body_in_crumbs_is_whole(crumb: int) -> None:
    body = bytes(range(256)) * 8
    pieces = [body[at : at + crumb] for at in range(0, len(body), crumb)]
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(lambda n: head + chunked) as (url, _):
        pool, to = ConnectionPool(len(body), 5.0), Address.of(url, {})
        for _ in range(2):
            assert (await pool.post(to, b"{}")).body == body
        await pool.close()
        narrow = ConnectionPool(len(body) - 1, 5.0)
        with pytest.raises(TooLargeError):
            await narrow.post(to, b"{}")
        await narrow.close()


async def test_a_handshake_that_hangs_is_late_and_nothing_went_out() -> None:
    """A server that accepts the connection and never speaks TLS."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        pool = ConnectionPool(1000, 0.2)
        began = time.monotonic()
        with pytest.raises(NotSentError) as caught:
            await pool.post(Address.of(f"https://127.0.0.1:{deaf.getsockname()[1]}/v1", {}), b"{}")
        assert caught.value.late
        assert time.monotonic() - began < 1.5
        await pool.close()


async def test_a_connect_that_hangs_is_late_and_nothing_went_out() -> None:
    with full_backlog() as port:
        pool = ConnectionPool(1000, 0.2)
        began = time.monotonic()
        with pytest.raises(NotSentError) as caught:
            await pool.post(Address.of(f"http://127.0.0.1:{port}/v1", {}), b"{}")
        assert caught.value.late
        assert time.monotonic() - began < 1.5
        await pool.close()


async def test_a_refused_connection_is_not_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    pool = ConnectionPool(1000, 5.0)
    for url in (f"http://127.0.0.1:{port}/v1", f"http://{'a' * 70}.invalid/v1"):
        with pytest.raises(NotSentError) as caught:
            await pool.post(Address.of(url, {}), b"{}")
        assert not caught.value.late
    await pool.close()


@pytest.mark.parametrize("header", ["a\r\nX-Evil: 1", "a\nb", "a\0b"])
def test_a_header_with_a_line_break_is_refused(header: str) -> None:
    with pytest.raises(ValueError, match="line break"):
        Address.of("http://host/v1", {"X-Team": header})


@pytest.mark.parametrize(
    ("url", "host", "port", "shown"),
    [
        ("https://api.example.com/v1", "api.example.com", 443, b"Host: api.example.com\r\n"),
        ("http://[::1]:8000/v1", "::1", 8000, b"Host: [::1]:8000\r\n"),
        ("http://müller.example/v1", "xn--mller-kva.example", 80, b"Host: xn--mller-kva.example\r\n"),
    ],
)
def test_addresses(url: str, host: str, port: int, shown: bytes) -> None:
    address = Address.of(url, {})
    assert (address.host, address.port) == (host, port)
    assert shown in address.head


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Of a name of our own, signed by itself."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("this system has no `openssl`")
    return cert, key


async def test_tls_is_spoken_and_strangers_are_not_trusted(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    async with serving(lambda n: OK % b"", context) as (url, seen):
        stranger, to = ConnectionPool(1000, 5.0), Address.of(url, {})
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await stranger.post(to, b"{}")
        await stranger.close()
        assert seen.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        pool = ConnectionPool(1000, 5.0)
        assert (await pool.post(to, b"{}")).body == b"hi"
        await pool.close()
