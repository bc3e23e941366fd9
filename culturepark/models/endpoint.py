"""Calls to an endpoint: replicas, limits, a wall-clock deadline, a byte cap, bounded retries.

A per-read timeout would let a dripping server hold a call for ever, so the deadline is around the
whole call.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import os
import random
import re
import resource
import stat
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec import Struct

from culturepark.errors import ConfigError
from culturepark.limits.adaptive import FIRST_LIMIT
from culturepark.limits.coordinator import Coordinator, known_limits
from culturepark.limits.gates import Gate, Pacer
from culturepark.messages import FailureKind, Seen, Share
from culturepark.models.connection import Address, ConnectionPool, NotSentError, TooLargeError
from culturepark.models.errors import ModelError
from culturepark.settings import ADDRESS_FIX, LimitSettings, ModelSettings, is_address, shown_address
from culturepark.text import tidy
from culturepark.usage import Usage

OPENAI_URL = "https://api.openai.com/v1"
SESSION_HEADER = "X-Session-ID"
"""Carries the call's affinity (`Brief.affinity`), for routers that keep a session on one replica."""

_SHOWN_CHARS = 240
"""No more of an endpoint's words than this goes into an error."""
_SECRET_CHARS = 16
"""A key that is shorter is a word such as `none`, for a server that wants any, and may well be said."""
_BROKEN: frozenset[FailureKind] = frozenset({"server", "timeout", "connection"})
"""The replica's fault: another one may well answer."""
_SICK_AFTER = 3
"""Faults in a row after which a replica is left alone but for trials, without waiting to be told."""
_TRIAL_S = 0.5
"""How often one request is tried at a sick replica."""
_BACK_S = 60.0
"""An engine of our own that refuses connections, or says 503, is starting, maybe again: a call waits so long
for it, and what it tries meanwhile is no attempt."""
_UNTOLD_LIMIT = 2
"""Requests at once to a replica until the coordinator has answered for the first time."""
_CONNECTIONS_LEAST, _CONNECTIONS_ANYWHERE = 8, 100_000
_OWN_PULSE_S = 0.1
_BEGIN_ELSEWHERE = 0x2D145116C16FF800
"""0.17609 of 2**64 (the logarithm of 1.5): by how much of all replicas each round of them begins further on.
Found by trial: two to sixteen kinds in turn are spread evenly over two, three, four and eight replicas."""
_NOTHING = Usage()
_UNKNOWN = Usage(calls=1, unreported=1, lost=1)
"""What a request took that went out and brought no count: nobody can say, and it is not nothing."""
_GATEWAY = frozenset({502, 504, 520, 524})
"""Said by what stands before the server and has lost its answer, which may well have been given, and billed.
By any other 5xx the server itself says that it gives none, and no service bills that."""


OnRetry = Callable[[str, str, ModelError, float], None]
"""Told the call's affinity, the address, what went wrong, and the seconds until the next attempt."""


class Reply(Struct, frozen=True, gc=False):
    """A body that came with status 200."""

    body: bytes
    url: str
    latency_s: float
    retries: int
    """Attempts before the one that brought it."""
    lost: Usage = _NOTHING
    """What those attempts took."""


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


def without_key(text: str, key: str) -> str:
    """An endpoint's words without the key, also if it shows only once what nobody sees is taken out."""
    if len(key) < _SECRET_CHARS:
        return text
    text = text.replace(key, "[key]")
    return clean.replace(key, "[key]") if key in (clean := tidy(text)) else text


def safe_words(text: str, key: str, most: int = _SHOWN_CHARS) -> str:
    """A service's words as they may be shown, logged and recorded: short, printable, without the key."""
    text = tidy(text).replace("\n", " ")
    if key:
        text = text.replace(key, "[key]")
    # Cut last: a key that lies across the cut would be left in part.
    return re.sub(r"\b(sk|Bearer)[-_ ][\w.-]{8,}", r"\1-[key]", text)[:most]


def _checked_key(key: str, where: str) -> str:
    # It goes into a header, where a line break or a curly quote cannot stand.
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        what = "what it holds cannot be a key (it is not shown here)."
        raise ConfigError(where, what, "Put the key alone there: no quotes, spaces or line breaks.")
    return key


class _Replica:
    """One address: its gate, and what was seen since the last report."""

    def __init__(self, url: str, limit: int) -> None:
        self.url = url
        self.salt = zlib.crc32(url.encode())
        self.targets: dict[str, Address] = {}
        self.gate = Gate(limit)
        self.weight = 1.0
        self.streak = 0
        self.trial_s = 0.0
        self.pacing = 0
        self.granted = 0
        self.resume_s = 0.0
        self.reset()

    def reset(self) -> None:
        self.completed = self.refused = self.broken = self.retried = 0
        self.latency_s = self.latency_sq = self.retry_after_s = 0.0
        self.prompt_tokens = self.completion_tokens = 0
        self.gate.most = self.gate.in_flight

    @property
    def well(self) -> bool:
        """Whether it is worth sending to."""
        return self.weight > 0 and self.streak < _SICK_AFTER and not self.gate.paused

    def target(self, path: str, headers: dict[str, str]) -> Address:
        target = self.targets.get(path)
        if target is None:
            target = self.targets[path] = Address.of(self.url + path, headers)
        return target


class HttpEndpoint:
    """POSTs JSON to the replicas of one endpoint.

    A call goes to the replica that its affinity names, and waits there until the limits let it
    through. A further attempt goes to another replica at once if the fault was the replica's and
    another is well; otherwise it waits first. A replica that is broken, or far slower than the others,
    gets a trial now and then until it has recovered. An engine that culturepark starts itself is started
    again when it ends, and is waited for.

    The limits are those that `obey` was told last. Until it is called for the first time, the endpoint
    works them out for itself, from its own calls. Neither goes beyond `most_connections`.

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
        self._model = model.served_name
        self._comes_back = model.engine == "embedded"
        self._limits = limits
        self._key = api_key_of(model) if model.engine == "openai" else ""
        self._headers = dict(model.headers)
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._most = max(1, most_connections() // len(self.urls))
        first = max(1, min(limits.requests_in_flight // len(self.urls), self._most))
        known = known_limits([model])
        if limits.adaptive:
            first = min(first, FIRST_LIMIT, *known.values())
        self._replicas = [_Replica(url, first) for url in dict.fromkeys(self.urls)]
        self._by_url = {replica.url: replica for replica in self._replicas}
        self._only = self._replicas[0] if len(self._replicas) == 1 else None
        rates = (limits.requests_per_minute, limits.tokens_per_minute)
        self._pacer = Pacer(*rates) if any(rates) else None
        self._own: Coordinator | None = Coordinator(limits, known)
        self._own_due_s = 0.0
        self._pauses: set[asyncio.Task[None]] = set()
        self._resting: set[asyncio.Future[Any]] = set()
        self._halted = False
        self._wire = ConnectionPool(limits.reply_bytes, limits.deadline_s)
        self._on_retry = on_retry
        self._sleep = sleep
        self._rng = rng or random.Random()

    async def post(
        self, path: str, body: bytes, *, affinity: str = "", skip: int = 0, tried: int = 0
    ) -> Reply:
        """The reply to `body`, after as many attempts as the limits allow. Raises ModelError.

        `skip` passes over that many replicas, whose replies were of no use; `tried` is how many attempts
        have gone into them, which count too. What failed attempts took is in the reply or the error.
        """
        attempt, lost = tried, _NOTHING
        avoid: list[_Replica] = []
        paced = False
        patient_until_s = 0.0
        while True:
            replica = self._only or self._choose(affinity, skip, avoid)
            if self._pacer is not None and not paced:
                await self._paced(replica, self._pacer)
                paced = True  # once an attempt, however often it is sent away
            if self._halted:
                raise ModelError("connection", "no call is begun any more", usage=lost)
            gate = replica.gate
            if not gate.try_enter() and (not await gate.enter() or self._left_halted(gate)):
                continue  # sent away: the replica is no longer well, or all is halted
            if attempt or skip:
                replica.retried += 1
            began = now = time.monotonic()
            try:
                raw = await self._once(replica.target(path, self._headers), body, affinity)
                now = time.monotonic()
                latency_s = now - began
                replica.completed += 1
                replica.latency_s += latency_s
                replica.latency_sq += latency_s * latency_s
                replica.streak = 0
                replica.trial_s = 0.0  # so that trials follow each other while they succeed
                return Reply(raw, replica.url, latency_s, attempt, lost)
            except ModelError as error:
                now = time.monotonic()
                error.attempts = attempt + 1
                waited = bool(patient_until_s)
                patient_until_s = (patient_until_s or now + _BACK_S) if self._starts(error) else 0.0
                patient = now < patient_until_s
                lost = error.usage = lost + error.usage
                self._failed(replica, error)
                if not error.passing or (attempt >= self._limits.retries and not patient):
                    raise
                failure = error
            finally:
                gate.leave()
                if self._own is not None and now >= self._own_due_s:
                    self._obey_self(self._own, now)
            wait_s = 0.0
            if failure.kind in _BROKEN:
                avoid.append(replica)
            if failure.kind not in _BROKEN or not any(r.well and r not in avoid for r in self._replicas):
                avoid.clear()
                wait_s = self.wait_before(0 if patient else attempt, failure.wait_s)
            if self._on_retry and not (patient and waited):
                self._on_retry(affinity, replica.url, failure, wait_s)
            if wait_s:
                await self._rest(wait_s)
            attempt, paced = attempt + (not patient), patient

    def _starts(self, error: ModelError) -> bool:
        """Whether this is what an engine of our own does that is starting."""
        absent = error.kind == "connection" or error.status == 503
        return self._comes_back and absent and not error.usage.calls

    def _left_halted(self, gate: Gate) -> bool:
        """Give back a place that came just before all was halted."""
        if self._halted:
            gate.leave()
        return self._halted

    async def _rest(self, wait_s: float) -> None:
        """Wait, unless all is halted meanwhile."""
        resting = asyncio.ensure_future(self._sleep(0 if self._halted else wait_s))
        self._resting.add(resting)
        try:
            await asyncio.wait([resting])
        finally:
            self._resting.discard(resting)
            resting.cancel()

    async def _paced(self, replica: _Replica, pacer: Pacer) -> None:
        replica.pacing += 1
        try:
            await pacer.turn()
        finally:
            replica.pacing -= 1

    def _choose(self, affinity: str, skip: int, avoid: list[_Replica]) -> _Replica:
        """The replica whose turn the dialogue's number is, or else by weighted rendezvous: a changed weight
        moves only the dialogues that it must."""
        well = [replica for replica in self._replicas if replica.well]
        if len(well) < len(self._replicas):
            now = time.monotonic()
            for replica in self._replicas:
                sick = not replica.well and replica not in avoid
                if sick and now >= replica.trial_s and not replica.gate.in_flight and replica.gate.free:
                    replica.trial_s = now + _TRIAL_S
                    return replica
        able = [r for r in well if r not in avoid] or well or self._replicas
        if len(able) == 1:
            return able[0]
        key = zlib.crc32(affinity.encode()) if affinity else self._rng.getrandbits(32)
        home = self._home(affinity, key, able)
        if home is not None and not skip:
            return home
        ranked = sorted(able, key=lambda r: (r is not home, _rank(key, r.salt, r.weight)))
        return ranked[skip % len(ranked)]

    def _home(self, affinity: str, key: int, able: list[_Replica]) -> _Replica | None:
        """The replica whose turn a dialogue's number is, if it can take its share of them: by chance alone
        one of two replicas would now and then have six of eight dialogues."""
        number = affinity.partition(".")[0]
        if not number.isdecimal():
            return None
        # In rounds of all, each begun elsewhere: what alternates in a plan must not always meet the same one.
        count = len(self._replicas)
        nth, place = divmod(int(number), count)
        home = self._replicas[(place + ((nth * _BEGIN_ELSEWHERE % 2**64) * count >> 64)) % count]
        most = max(one.weight for one in able) or 1.0
        return home if home in able and _share(key, ~home.salt) <= home.weight / most else None

    def _failed(self, replica: _Replica, error: ModelError) -> None:
        """Count a failure, and act on it here at once, before any coordinator says so."""
        if error.kind == "rate_limited":
            replica.refused += 1
            if error.wait_s:
                wait_s = min(error.wait_s, self._limits.backoff_max_s)
                replica.retry_after_s = max(replica.retry_after_s, wait_s)
                self._pause(replica, wait_s)
        elif error.kind in _BROKEN:
            replica.broken += 1
            replica.streak += 1
            if replica.streak == _SICK_AFTER:
                replica.trial_s = time.monotonic() + _TRIAL_S
        else:
            replica.streak = 0  # it answers, whatever it says
        if not replica.well:
            self._let_go(replica)

    def _let_go(self, replica: _Replica) -> None:
        """Who waits at a replica that is not well goes to one that is, if there is one."""
        if any(other.well for other in self._replicas):
            replica.gate.send_away()

    def _pause(self, replica: _Replica, wait_s: float) -> None:
        resume_s = time.monotonic() + wait_s
        if resume_s <= replica.resume_s:
            return
        replica.resume_s = resume_s
        replica.gate.pause()

        async def resume() -> None:
            await self._sleep(wait_s)
            if replica.resume_s == resume_s:  # no longer pause was asked for since
                replica.gate.resume()

        task = asyncio.get_running_loop().create_task(resume())
        self._pauses.add(task)
        task.add_done_callback(self._pauses.discard)

    # --- limits

    def spent(self, url: str, prompt_tokens: int, completion_tokens: int) -> None:
        """What a reply from a replica took."""
        replica = self._by_url[url]
        replica.prompt_tokens += prompt_tokens
        replica.completion_tokens += completion_tokens
        if self._pacer is not None:
            self._pacer.spent(prompt_tokens + completion_tokens)

    def report(self) -> list[Seen]:
        """What was seen of each replica since the last report."""
        seen: list[Seen] = []
        for replica in self._replicas:
            gate = replica.gate
            seen.append(
                Seen(
                    replica.url,
                    self._model,
                    replica.completed,
                    replica.latency_s,
                    replica.latency_sq,
                    replica.refused,
                    replica.retry_after_s,
                    replica.broken,
                    gate.in_flight,
                    gate.waiting + replica.pacing,
                    gate.most,
                    replica.prompt_tokens,
                    replica.completion_tokens,
                    replica.granted,
                    replica.retried,
                )
            )
            replica.reset()
        return seen

    def obey(self, shares: Iterable[Share]) -> None:
        """Keep to these shares, of those that are this endpoint's. From now on nobody else is asked:
        call it with none at all before the first request, and that one waits for the coordinator."""
        if self._own is not None:
            self._own = None
            for replica in self._replicas:
                replica.gate.set_limit(min(replica.gate.limit, _UNTOLD_LIMIT))
            if self._pacer is not None:
                self._pacer.set_rates(0, 0)
        self._keep_to(shares, granted=True)

    def hold(self, held: bool) -> None:
        """Begin no request for as long as this is so: there is nobody who would keep the reply."""
        if self._pacer is not None:
            # Or who waits would gather behind the gate, and all go at once.
            self._pacer.hold(held and not self._halted)
        for replica in self._replicas:
            replica.gate.hold(held)

    def halt(self) -> None:
        """Begin no further request. Who waits for one is told so, with what it has taken, since that has to
        be counted; those under way end as they may."""
        self._halted = True
        if self._pacer is not None:
            self._pacer.end()
        for replica in self._replicas:
            replica.gate.close()
            replica.gate.send_away()
        for resting in self._resting:
            resting.cancel()

    def _obey_self(self, own: Coordinator, now_s: float) -> None:
        self._own_due_s = now_s + _OWN_PULSE_S
        self._keep_to(own.take("", self.report(), now_s), granted=False)

    def _keep_to(self, shares: Iterable[Share], *, granted: bool) -> None:
        rates: tuple[float, float] | None = None
        better = False
        for share in shares:
            replica = self._by_url.get(share.url) if share.model == self._model else None
            if replica is None:
                continue
            better |= share.weight > replica.weight
            replica.weight = share.weight
            limit = min(share.limit, self._most)
            replica.granted = limit if granted else 0
            replica.gate.set_limit(limit)
            rates = share.requests_per_minute, share.tokens_per_minute
        for replica in self._replicas:
            if replica.gate.waiting and not replica.well:
                self._let_go(replica)
            elif better:
                replica.gate.send_away()  # who waits at others, and was to go to one that is back, goes there
        if rates is not None and self._pacer is not None:
            self._pacer.set_rates(*rates)

    # --- one call

    def wait_before(self, attempt: int, asked_s: float | None) -> float:
        """Seconds to wait after failed attempt `attempt`: exponential with full jitter, at least
        what the endpoint asked for, never more than the limit."""
        ceiling = min(self._limits.backoff_max_s, self._limits.backoff_s * 2.0 ** min(attempt, 30))
        wait = ceiling * (0.5 + 0.5 * self._rng.random())
        return min(self._limits.backoff_max_s, max(wait, asked_s or 0.0))

    async def _once(self, to: Address, body: bytes, affinity: str) -> bytes:
        extra = f"{SESSION_HEADER}: {affinity}\r\n".encode("ascii") if affinity else b""
        try:
            answer = await self._wire.post(to, body, extra)
        except NotSentError as error:
            if error.late:
                raise ModelError("timeout", f"no connection within {self._limits.deadline_s:g} s") from None
            raise ModelError("connection", self.safe(str(error))) from None
        except TimeoutError:
            raise _lost("timeout", f"no whole reply within {self._limits.deadline_s:g} s") from None
        except TooLargeError:
            raise _lost("too_large", f"the reply is larger than {self._limits.reply_bytes} bytes") from None
        except ValueError as error:  # NotHttpError, and whatever else bytes of a server's may lead to
            raise _lost("invalid_reply", f"this is not HTTP: {self.safe(str(error))}") from None
        except OSError as error:
            raise _lost("connection", self.safe(str(error) or type(error).__name__)) from None
        if answer.status == 200:
            return answer.body
        raise self._refusal(answer.status, answer.retry_after, answer.body)

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
            usage=_UNKNOWN if status < 300 or status in _GATEWAY else None,
            status=status,
            wait_s=seconds_of(retry_after),
        )

    def safe(self, text: str) -> str:
        """An endpoint's words, as `safe_words`."""
        return safe_words(text, self._key)

    def keyless(self, text: str) -> str:
        """What a model said, without the key: an endpoint may echo it, and all that is said is kept."""
        return without_key(text, self._key)

    async def close(self) -> None:
        """Close the session."""
        for pause in tuple(self._pauses):
            pause.cancel()
        await self._wire.close()


def most_connections() -> int:
    """How many connections one endpoint may have in this process, by the files that it may have open. Half
    of them: there are other endpoints, and other files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CONNECTIONS_ANYWHERE if soft == resource.RLIM_INFINITY else max(_CONNECTIONS_LEAST, soft // 2)


def _lost(kind: FailureKind, reason: str) -> ModelError:
    """A request that went out and whose answer did not come, or not whole: it may have been billed."""
    return ModelError(kind, reason, usage=_UNKNOWN)


def _rank(key: int, salt: int, weight: float) -> float:
    """The place of a replica for a key, least first (Thaler and Ravishankar 1998; weighted)."""
    return -math.log(_share(key, salt)) / (weight or 1.0)


def _share(key: int, salt: int) -> float:
    """A number above 0, at most 1, that is evenly spread over keys, and independent for each salt."""
    # A CRC alone is linear, so that two replicas' places would hang together; two rounds of mixing part them.
    mixed = (key ^ salt) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return ((mixed >> 11) + 1) / 9007199254740993


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
