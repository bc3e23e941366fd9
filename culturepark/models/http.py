"""The hot path's HTTP: one session, replicas, a wall-clock deadline, a byte cap, bounded retries.

A per-read timeout would let a dripping server hold a call for ever, so the deadline is around the
whole call; and a small compressed body can become a huge one, so the cap counts decoded bytes.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import re
import stat
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
from msgspec import Struct

from culturepark.errors import ConfigError
from culturepark.messages import FailureKind
from culturepark.models.errors import ModelError
from culturepark.prompts.text import tidy
from culturepark.settings import ADDRESS_FIX, LimitSettings, ModelSettings, is_address, shown_address

OPENAI_URL = "https://api.openai.com/v1"
SESSION_HEADER = "X-Session-ID"
"""Carries the dialogue's id, for routers that keep a session on one replica."""


_SHOWN_CHARS = 240
"""No more of an endpoint's words than this goes into an error."""
_READ_BYTES = 65_536
"""No more of an error body than this is looked at."""


OnRetry = Callable[[str, str, ModelError, float], None]
"""Told the dialogue, the address, what went wrong, and the seconds until the next attempt."""


class Reply(Struct, frozen=True):
    """A body that came with status 200."""

    body: bytes
    url: str
    latency_s: float
    retries: int


def base_urls_of(model: ModelSettings) -> tuple[str, ...]:
    """The replicas of an endpoint, without a slash at their end. Raises ConfigError if
    OPENAI_BASE_URL is used and is no plain address."""
    if model.base_urls:
        return tuple(url.rstrip("/") for url in model.base_urls)
    url = os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
    if not is_address(url):
        what = f"{shown_address(url)!r} is not an http(s) address."
        raise ConfigError("OPENAI_BASE_URL", what, ADDRESS_FIX)
    return (url.rstrip("/"),)


def api_key_of(model: ModelSettings) -> str:
    """The key in the named variable, or in the file that `<NAME>_FILE` names; empty if neither is
    set. Raises ConfigError if the file can be read by others, or not at all, or if what it holds
    cannot be a key."""
    name = model.api_key_env
    if key := os.environ.get(name, "").strip():
        return _checked_key(key, name)
    if not (file := os.environ.get(f"{name}_FILE", "")):
        return ""
    try:
        if stat.S_IMODE(Path(file).stat().st_mode) & 0o077:
            raise ConfigError(f"{name}_FILE", f"others may read {file}.", f"Run `chmod 600 {file}`.")
        return _checked_key(Path(file).read_text("utf-8").strip(), f"{name}_FILE")
    except OSError as error:
        raise ConfigError(
            f"{name}_FILE", f"{file} cannot be read: {error.strerror}.", "Check the path."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name}_FILE", f"{file} holds no text.", "Put the key alone into it.") from None


def _checked_key(key: str, where: str) -> str:
    # It goes into a header, where a line break or a curly quote cannot stand.
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        what = "what it holds cannot be a key (it is not shown here)."
        raise ConfigError(where, what, "Put the key alone there: no quotes, spaces or line breaks.")
    return key


class HttpEndpoint:
    """POSTs JSON to the replicas of one endpoint.

    A call goes to the replica that its affinity names; a further attempt goes to the next one.
    `on_retry` is told of each further attempt. `sleep` and `rng` are arguments so that tests wait
    for nothing.
    """

    def __init__(
        self,
        model: ModelSettings,
        limits: LimitSettings,
        *,
        on_retry: OnRetry | None = None,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.urls = base_urls_of(model)
        self._limits = limits
        self._key = api_key_of(model) if model.engine == "openai" else ""
        self._headers = {"Content-Type": "application/json", **model.headers}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._slots = asyncio.Semaphore(limits.requests_in_flight)
        self._session: aiohttp.ClientSession | None = None
        self._on_retry = on_retry
        self._sleep = sleep
        self._rng = rng or random.Random()

    async def post(self, path: str, body: bytes, *, affinity: str = "", skip: int = 0) -> Reply:
        """The reply to `body`, after as many attempts as the limits allow. Raises ModelError.

        `skip` passes over that many replicas, whose replies were of no use.
        """
        start = skip + (zlib.crc32(affinity.encode()) if affinity else self._rng.randrange(1 << 30))
        attempt = 0
        while True:
            url = self.urls[(start + attempt) % len(self.urls)]
            began = time.monotonic()
            try:
                async with self._slots:
                    began = time.monotonic()
                    raw = await self._once(url + path, body, affinity)
                return Reply(raw, url, time.monotonic() - began, attempt)
            except ModelError as error:
                if not error.passing or attempt >= self._limits.retries:
                    raise
                wait_s = self.wait_before(attempt, error.wait_s)
                if self._on_retry:
                    self._on_retry(affinity, url, error, wait_s)
                await self._sleep(wait_s)
                attempt += 1

    def wait_before(self, attempt: int, asked_s: float | None) -> float:
        """Seconds to wait after failed attempt `attempt`: exponential with full jitter, at least
        what the endpoint asked for, never more than the limit."""
        ceiling = min(self._limits.backoff_max_s, self._limits.backoff_s * 2.0 ** min(attempt, 30))
        wait = ceiling * (0.5 + 0.5 * self._rng.random())
        return min(self._limits.backoff_max_s, max(wait, asked_s or 0.0))

    async def _once(self, url: str, body: bytes, affinity: str) -> bytes:
        headers = {**self._headers, SESSION_HEADER: affinity} if affinity else self._headers
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                async with self._open().post(
                    url, data=body, headers=headers, allow_redirects=False
                ) as response:
                    raw = await self._read(response)
        except TimeoutError:
            raise ModelError("timeout", f"no whole reply within {self._limits.deadline_s:g} s") from None
        except aiohttp.ClientPayloadError as error:
            raise ModelError("connection", f"the reply broke off: {self.safe(str(error))}") from None
        except aiohttp.ClientResponseError as error:
            raise ModelError("invalid_reply", f"this is not HTTP: {self.safe(error.message)}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ModelError("connection", self.safe(str(error) or type(error).__name__)) from None
        if response.status == 200:
            return raw
        raise self._refusal(response.status, response.headers.get("Retry-After"), raw)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > self._limits.reply_bytes:
                response.close()
                raise ModelError("too_large", f"the reply is larger than {self._limits.reply_bytes} bytes")
            parts.append(part)
        return b"".join(parts)

    def _refusal(self, status: int, retry_after: str | None, raw: bytes) -> ModelError:
        kind: FailureKind
        if status == 401:
            kind = "unauthorised"
        elif status == 403:
            kind = "refused"  # often one prompt's content; a key that is refused is found before the run
        elif status == 404:
            kind = "no_such_model"
        elif status == 429:
            # Out of money is no matter of waiting.
            kind = "unauthorised" if b"insufficient_quota" in raw[:4096] else "rate_limited"
        elif status >= 500 or status in (408, 409, 425):
            kind = "server"
        else:
            kind = "bad_request"
        return ModelError(
            kind,
            f"HTTP {status}: {self.safe(_message_in(raw))}",
            status=status,
            wait_s=seconds_of(retry_after),
        )

    def safe(self, text: str) -> str:
        """An endpoint's words as they may be logged: short, printable, without the key."""
        text = tidy(text).replace("\n", " ")
        if self._key:
            text = text.replace(self._key, "[key]")
        # Cut last: a key that lies across the cut would be left in part.
        return re.sub(r"\b(sk|Bearer)[-_ ][\w.-]{8,}", r"\1-[key]", text)[:_SHOWN_CHARS]

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)  # the semaphore limits
            timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    async def close(self) -> None:
        """Close the session."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def seconds_of(retry_after: str | None) -> float | None:
    """The wait that a Retry-After header asks for; None where it makes no sense."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


def _message_in(raw: bytes) -> str:
    """The words of an error body, whatever its shape."""
    try:
        body: Any = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return raw[:_READ_BYTES].decode("utf-8", "replace")
    if isinstance(body, dict):
        body = cast(dict[str, Any], body).get("error", cast(object, body))
    if isinstance(body, dict):
        body = cast(dict[str, Any], body).get("message", cast(object, body))
    return str(body)[:_READ_BYTES]
