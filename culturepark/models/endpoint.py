"""One call to an endpoint: its attempts, their deadline, and what failed attempts cost.

A per-read timeout would let a dripping server hold a call for ever, so the deadline is around the
whole call.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
from msgspec import Struct

from culturepark.limits.gates import Gate
from culturepark.messages import FailureKind
from culturepark.models.connection import Address, ConnectionPool, NotSentError, TooLargeError
from culturepark.models.errors import ModelError
from culturepark.models.replicas import REPLICA_FAULTS, Replica, Replicas
from culturepark.models.secrets import api_key_of, safe_words, without_key
from culturepark.settings import LimitSettings, ModelSettings
from culturepark.usage import Usage

SESSION_HEADER = "X-Session-ID"
"""Carries the call's affinity (`Brief.affinity`), for routers that keep a session on one replica."""

_RESTART_S = 60.0
"""Seconds that a call waits for an engine of our own that refuses connections, or says 503: it is starting.
Requests that are sent meanwhile are no attempts."""
_NO_USAGE = Usage()
UNKNOWN_USAGE = Usage(calls=1, unreported=1, lost=1)
"""The usage of a request that was sent and brought no count: it is unknown, which is not nothing."""
_GATEWAY = frozenset({502, 504, 520, 524})
"""HTTP statuses of a gateway that has lost the server's answer, which may well have been given, and billed.
With any other 5xx the server itself says that it gives none, and no service bills that."""


OnRetry = Callable[[str, str, ModelError, float], None]
"""A callback with the call's affinity, the address, the error, and the seconds until the next attempt."""


class Reply(Struct, frozen=True, gc=False):
    """A body that came with status 200."""

    body: bytes
    url: str
    latency_s: float
    retries: int
    """Attempts before the one that brought it."""
    lost: Usage = _NO_USAGE
    """The usage of those attempts."""


class HttpEndpoint:
    """POSTs JSON to the replicas of one endpoint.

    A call goes to the replica that its affinity names (session affinity), and waits there until the limits
    let it through. A further attempt goes to another replica at once if the fault was the replica's and
    another is healthy; otherwise it waits first (exponential backoff). An engine that culturepark starts
    itself is started again when it ends, and is waited for.

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
        self._sleep = sleep
        self._rng = rng or random.Random()
        self.replicas = Replicas(model, limits, sleep, self._rng)
        self._restarts = model.engine == "embedded"
        self._limits = limits
        self._key = api_key_of(model) if model.engine == "openai" else ""
        self._headers = dict(model.headers)
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._backoffs: set[asyncio.Future[Any]] = set()
        self._halted = False
        self._pool = ConnectionPool(limits.reply_bytes, limits.deadline_s)
        self._on_retry = on_retry

    async def post(
        self, path: str, body: bytes, *, affinity: str = "", skip: int = 0, tried: int = 0
    ) -> Reply:
        """The reply to `body`, after as many attempts as the limits allow. Raises ModelError.

        `skip` passes over that many replicas, whose replies were of no use; `tried` is how many attempts
        have gone into them, which count too. The usage of failed attempts is in the reply or the error.
        """
        replicas = self.replicas
        attempt, lost = tried, _NO_USAGE
        avoid: list[Replica] = []
        paced = False
        restart_until_s = 0.0
        while True:
            replica = replicas.only or replicas.choose(affinity, skip, avoid)
            if replicas.pacer is not None and not paced:
                await replicas.wait_for_rate(replica, replicas.pacer)
                paced = True  # once an attempt, however often it is sent to another replica
            if self._halted:
                raise ModelError("connection", "no call is begun any more", usage=lost)
            gate = replica.gate
            if not gate.try_enter() and (not await gate.enter() or self._left_halted(gate)):
                continue  # not let in: the replica is no longer healthy, or all is halted
            if attempt or skip:
                replica.retried += 1
            began = now = time.monotonic()
            try:
                to = replica.addresses.get(path) or replica.address_of(path, self._headers)
                raw = await self._once(to, body, affinity)
                now = time.monotonic()
                replica.succeeded(now - began)
                return Reply(raw, replica.url, now - began, attempt, lost)
            except ModelError as error:
                now = time.monotonic()
                error.attempts = attempt + 1
                was_restarting = bool(restart_until_s)
                restart_until_s = (restart_until_s or now + _RESTART_S) if self._is_absent(error) else 0.0
                restarting = now < restart_until_s
                lost = error.usage = lost + error.usage
                replicas.failed(replica, error)
                if not error.passing or (attempt >= self._limits.retries and not restarting):
                    raise
                failure = error
            finally:
                gate.leave()
                if now >= replicas.decide_due_s:
                    replicas.decide(now)
            wait_s = 0.0
            if failure.kind in REPLICA_FAULTS:
                avoid.append(replica)
            if failure.kind not in REPLICA_FAULTS or not replicas.other_is_healthy(avoid):
                avoid.clear()
                wait_s = self.wait_before(0 if restarting else attempt, failure.wait_s)
            if self._on_retry and not (restarting and was_restarting):
                self._on_retry(affinity, replica.url, failure, wait_s)
            if wait_s:
                await self._back_off(wait_s)
            attempt, paced = attempt + (not restarting), restarting

    def _is_absent(self, error: ModelError) -> bool:
        """Whether the failure is that of an engine of our own that is starting, maybe again."""
        absent = error.kind == "connection" or error.status == 503
        return self._restarts and absent and not error.usage.calls

    def _left_halted(self, gate: Gate) -> bool:
        """Leave the gate again if all was halted just after it had let this request in."""
        if self._halted:
            gate.leave()
        return self._halted

    async def _back_off(self, wait_s: float) -> None:
        """Wait, unless all is halted meanwhile."""
        backoff = asyncio.ensure_future(self._sleep(0 if self._halted else wait_s))
        self._backoffs.add(backoff)
        try:
            await asyncio.wait([backoff])
        finally:
            self._backoffs.discard(backoff)
            backoff.cancel()

    def wait_before(self, attempt: int, asked_s: float | None) -> float:
        """Seconds to wait after failed attempt `attempt`: exponential backoff with jitter, at least
        what the endpoint asked for, never more than the limit."""
        ceiling = min(self._limits.backoff_max_s, self._limits.backoff_s * 2.0 ** min(attempt, 30))
        wait = ceiling * (0.5 + 0.5 * self._rng.random())
        return min(self._limits.backoff_max_s, max(wait, asked_s or 0.0))

    async def _once(self, to: Address, body: bytes, affinity: str) -> bytes:
        """The body of the reply to one attempt. Raises ModelError."""
        extra = f"{SESSION_HEADER}: {affinity}\r\n".encode("ascii") if affinity else b""
        try:
            response = await self._pool.post(to, body, extra)
        except NotSentError as error:
            if error.late:
                raise ModelError("timeout", f"no connection within {self._limits.deadline_s:g} s") from None
            raise ModelError("connection", self.safe(str(error))) from None
        except TimeoutError:
            raise _unanswered("timeout", f"no whole reply within {self._limits.deadline_s:g} s") from None
        except TooLargeError:
            what = f"the reply is larger than {self._limits.reply_bytes} bytes"
            raise _unanswered("too_large", what) from None
        except ValueError as error:  # NotHttpError, and whatever else bytes of a server's may lead to
            raise _unanswered("invalid_reply", f"this is not HTTP: {self.safe(str(error))}") from None
        except OSError as error:
            raise _unanswered("connection", self.safe(str(error) or type(error).__name__)) from None
        if response.status == 200:
            return response.body
        raise self._refusal(response.status, response.retry_after, response.body)

    def _refusal(self, status: int, retry_after: str | None, raw: bytes) -> ModelError:
        kind: FailureKind
        if status in (401, 402):
            kind = "unauthorised"  # out of money, no call is answered either
        elif status == 403:
            kind = "forbidden"
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
            usage=UNKNOWN_USAGE if status < 300 or status in _GATEWAY else None,
            status=status,
            wait_s=seconds_of(retry_after),
        )

    def safe(self, text: str) -> str:
        """An endpoint's words, as `safe_words`."""
        return safe_words(text, self._key)

    def keyless(self, text: str) -> str:
        """What a model said, without the key: an endpoint may echo it, and all that is said is kept."""
        return without_key(text, self._key)

    def halt(self) -> None:
        """Begin no further request. A call that waits to begin one raises ModelError with its usage so far,
        since that has to be counted; requests under way end as they may."""
        self._halted = True
        self.replicas.close()
        for backoff in self._backoffs:
            backoff.cancel()

    async def close(self) -> None:
        """Close the connections."""
        self.replicas.cancel_pauses()
        await self._pool.close()


def _unanswered(kind: FailureKind, reason: str) -> ModelError:
    """A request that was sent and whose reply did not come, or not whole: it may have been billed."""
    return ModelError(kind, reason, usage=UNKNOWN_USAGE)


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
        return raw.decode("utf-8", "replace")
    if isinstance(body, dict):
        body = cast(dict[str, Any], body).get("error", cast(object, body))
    if isinstance(body, dict):
        body = cast(dict[str, Any], body).get("message", cast(object, body))
    return str(body)
