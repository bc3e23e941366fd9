"""The replicas of one endpoint: which of them a call goes to, which of them are healthy, how many requests
each may have at once, and the reports of their load.

A dialogue stays at one replica (session affinity), whose prompt cache then holds its transcript.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import resource
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from culturepark.errors import ConfigError
from culturepark.limits.adaptive import FIRST_LIMIT
from culturepark.limits.coordinator import Coordinator, known_limits
from culturepark.limits.gates import Gate, Pacer
from culturepark.messages import FailureKind, Seen, Share
from culturepark.models.connection import Address
from culturepark.models.errors import ModelError
from culturepark.settings import ADDRESS_FIX, LimitSettings, ModelSettings, is_address, shown_address

OPENAI_URL = "https://api.openai.com/v1"
REPLICA_FAULTS: frozenset[FailureKind] = frozenset({"server", "timeout", "connection"})
"""Failures that are the replica's fault: another replica may well answer the same request."""
_OPEN_AFTER = 3
"""A replica's circuit breaker opens after this many faults in a row, before any coordinator says so."""
_TRIAL_S = 0.5
"""Seconds between trial requests to a replica whose circuit breaker is open."""
_FIRST_SHARE = 2
"""Requests at once to a replica until the coordinator has answered for the first time."""
_LEAST_CONNECTIONS, _UNBOUNDED_CONNECTIONS = 8, 100_000
_DECIDE_EVERY_S = 0.1
"""Seconds between two decisions on the limits, while this process decides on them alone."""
_ROUND_OFFSET = 0x2D145116C16FF800
"""Each round begins further on by this part of all replicas, in units of 2**-64: 0.17609, the log of 1.5.
Found by trial: two to sixteen kinds in turn are spread evenly over two, three, four and eight replicas."""


def base_urls_of(model: ModelSettings) -> tuple[str, ...]:
    """The addresses of an endpoint's replicas, without a slash at their end. Raises ConfigError if
    OPENAI_BASE_URL is used and is no plain address."""
    if model.base_urls:
        return tuple(url.rstrip("/") for url in model.base_urls)
    url = os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
    if not is_address(url):
        what = f"{shown_address(url)!r} is not an http(s) address."
        raise ConfigError("OPENAI_BASE_URL", what, ADDRESS_FIX)
    return (url.rstrip("/"),)


class Replica:
    """One replica: its gate, its health, and the counts since the last load report."""

    def __init__(self, url: str, limit: int) -> None:
        self.url = url
        self.salt = zlib.crc32(url.encode())
        self.addresses: dict[str, Address] = {}
        """Where requests go, by path."""
        self.gate = Gate(limit)
        self.weight = 1.0
        """For routing, 0 to 1, as `Share.weight`."""
        self.faults_in_row = 0
        self.next_trial_s = 0.0
        self.waiting_for_rate = 0
        """Requests that wait for the endpoint's rate limit."""
        self.granted = 0
        """The limit of the coordinator's last share, 0 before the first."""
        self.resume_s = 0.0
        """When the latest pause that the replica asked for (Retry-After) is over."""
        self.reset()

    def reset(self) -> None:
        """Begin to count for the next load report."""
        self.completed = self.refused = self.broken = self.retried = 0
        self.latency_s = self.latency_sq = self.retry_after_s = 0.0
        self.prompt_tokens = self.completion_tokens = 0
        self.gate.most = self.gate.in_flight

    @property
    def healthy(self) -> bool:
        """Whether more than trials go to it: its circuit breaker is closed, and no pause was asked for."""
        return self.weight > 0 and self.faults_in_row < _OPEN_AFTER and not self.gate.paused

    def address_of(self, path: str, headers: dict[str, str]) -> Address:
        """Where requests with this path go; kept in `addresses`."""
        address = self.addresses[path] = Address.of(self.url + path, headers)
        return address

    def succeeded(self, latency_s: float) -> None:
        """Count a reply."""
        self.completed += 1
        self.latency_s += latency_s
        self.latency_sq += latency_s * latency_s
        self.faults_in_row = 0
        self.next_trial_s = 0.0  # so that trials follow each other while they succeed

    def report(self, model: str) -> Seen:
        """What was counted since the last report."""
        gate = self.gate
        seen = Seen(
            self.url,
            model,
            self.completed,
            self.latency_s,
            self.latency_sq,
            self.refused,
            self.retry_after_s,
            self.broken,
            gate.in_flight,
            gate.waiting + self.waiting_for_rate,
            gate.most,
            self.prompt_tokens,
            self.completion_tokens,
            self.granted,
            self.retried,
        )
        self.reset()
        return seen


class Replicas:
    """The replicas of one endpoint.

    A replica that fails, or is far slower than the others, gets a trial request now and then until it has
    recovered (circuit breaker). The limits are those that `obey` was given last. Until it is called for the
    first time, they are worked out here, from this process's own calls. Neither goes beyond
    `most_connections`.
    """

    def __init__(
        self,
        model: ModelSettings,
        limits: LimitSettings,
        sleep: Callable[[float], Awaitable[Any]],
        rng: random.Random,
    ) -> None:
        self.urls = base_urls_of(model)
        self._model = model.served_name
        self._most_wait_s = limits.backoff_max_s
        self._most = max(1, most_connections() // len(self.urls))
        first = max(1, min(limits.requests_in_flight // len(self.urls), self._most))
        known = known_limits([model])
        if limits.adaptive:
            first = min(first, FIRST_LIMIT, *known.values())
        self.all = [Replica(url, first) for url in dict.fromkeys(self.urls)]
        self.by_url = {replica.url: replica for replica in self.all}
        self.only = self.all[0] if len(self.all) == 1 else None
        """The one that all calls go to, if there is no choice."""
        rates = (limits.requests_per_minute, limits.tokens_per_minute)
        self.pacer = Pacer(*rates) if any(rates) else None
        self._local: Coordinator | None = Coordinator(limits, known)
        self.decide_due_s = 0.0
        """When `decide` is to be called next; never, once a coordinator decides for all processes."""
        self._pauses: set[asyncio.Task[None]] = set()
        self._closed = False
        self._sleep = sleep
        self._rng = rng

    # --- routing

    def choose(self, affinity: str, skip: int, avoid: list[Replica]) -> Replica:
        """The replica for a call: the home of its dialogue's number, or else the first ranked by affinity
        (weighted rendezvous hashing), so that a changed weight moves no more dialogues than it must.

        `skip` passes over that many replicas; those in `avoid` are chosen only if no other is healthy.
        """
        healthy = [replica for replica in self.all if replica.healthy]
        if len(healthy) < len(self.all):
            now = time.monotonic()
            for replica in self.all:
                on_trial = not replica.healthy and replica not in avoid
                due = on_trial and now >= replica.next_trial_s
                if due and not replica.gate.in_flight and replica.gate.free:
                    replica.next_trial_s = now + _TRIAL_S
                    return replica
        able = [r for r in healthy if r not in avoid] or healthy or self.all
        if len(able) == 1:
            return able[0]
        key = zlib.crc32(affinity.encode()) if affinity else self._rng.getrandbits(32)
        home = self._home(affinity, key, able)
        if home is not None and not skip:
            return home
        ranked = sorted(able, key=lambda r: (r is not home, _rank(key, r.salt, r.weight)))
        return ranked[skip % len(ranked)]

    def _home(self, affinity: str, key: int, able: list[Replica]) -> Replica | None:
        """The replica whose turn a dialogue's number is (round robin), unless its weight leaves this dialogue
        to others. By hashing alone one of two replicas would now and then have six of eight dialogues."""
        number = affinity.partition(".")[0]
        if not number.isdecimal():
            return None
        # Each round begins at another replica: what alternates in a plan must not always meet the same one.
        count = len(self.all)
        nth, place = divmod(int(number), count)
        home = self.all[(place + ((nth * _ROUND_OFFSET % 2**64) * count >> 64)) % count]
        most = max(one.weight for one in able) or 1.0
        return home if home in able and _fraction(key, ~home.salt) <= home.weight / most else None

    def other_is_healthy(self, avoid: list[Replica]) -> bool:
        """Whether there is a healthy replica beside those in `avoid`."""
        return any(replica.healthy and replica not in avoid for replica in self.all)

    # --- health

    def failed(self, replica: Replica, error: ModelError) -> None:
        """Count a failure, and act on it at once, before any coordinator says so."""
        if error.kind == "rate_limited":
            replica.refused += 1
            if error.wait_s:
                wait_s = min(error.wait_s, self._most_wait_s)
                replica.retry_after_s = max(replica.retry_after_s, wait_s)
                self._pause(replica, wait_s)
        elif error.kind in REPLICA_FAULTS:
            replica.broken += 1
            replica.faults_in_row += 1
            if replica.faults_in_row == _OPEN_AFTER:
                replica.next_trial_s = time.monotonic() + _TRIAL_S
        else:
            replica.faults_in_row = 0  # it answers, whatever it says
        if not replica.healthy:
            self._reroute(replica)

    def _reroute(self, replica: Replica) -> None:
        """Requests that wait for a replica that is not healthy choose again, if another one is."""
        if any(other.healthy for other in self.all):
            replica.gate.reject_waiting()

    def _pause(self, replica: Replica, wait_s: float) -> None:
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

    async def wait_for_rate(self, replica: Replica, pacer: Pacer) -> None:
        """Wait until the rate limit lets one more request through; meanwhile it counts as waiting."""
        replica.waiting_for_rate += 1
        try:
            await pacer.acquire()
        finally:
            replica.waiting_for_rate -= 1

    def spent(self, url: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of a reply from the replica at `url`."""
        replica = self.by_url[url]
        replica.prompt_tokens += prompt_tokens
        replica.completion_tokens += completion_tokens
        if self.pacer is not None:
            self.pacer.spent(prompt_tokens + completion_tokens)

    def report(self) -> list[Seen]:
        """What was seen of each replica since the last report."""
        return [replica.report(self._model) for replica in self.all]

    def obey(self, shares: Iterable[Share]) -> None:
        """Keep to these shares, of those that are this endpoint's. From now on a coordinator decides:
        call it with none at all before the first request, and that one waits for the coordinator."""
        if self._local is not None:
            self._local = None
            self.decide_due_s = math.inf
            for replica in self.all:
                replica.gate.set_limit(min(replica.gate.limit, _FIRST_SHARE))
            if self.pacer is not None:
                self.pacer.set_rates(0, 0)
        self._apply(shares, granted=True)

    def decide(self, now_s: float) -> None:
        """Set the limits by what this process saw, as long as no coordinator does."""
        if self._local is not None:
            self.decide_due_s = now_s + _DECIDE_EVERY_S
            self._apply(self._local.update("", self.report(), now_s), granted=False)

    def _apply(self, shares: Iterable[Share], *, granted: bool) -> None:
        rates: tuple[float, float] | None = None
        better = False
        for share in shares:
            replica = self.by_url.get(share.url) if share.model == self._model else None
            if replica is None:
                continue
            better |= share.weight > replica.weight
            replica.weight = share.weight
            limit = min(share.limit, self._most)
            replica.granted = limit if granted else 0
            replica.gate.set_limit(limit)
            rates = share.requests_per_minute, share.tokens_per_minute
        for replica in self.all:
            if replica.gate.waiting and not replica.healthy:
                self._reroute(replica)
            elif better:
                replica.gate.reject_waiting()  # requests whose own replica is back choose it again
        if rates is not None and self.pacer is not None:
            self.pacer.set_rates(*rates)

    def hold(self, held: bool) -> None:
        """Begin no request for as long as this is so: there is no actor that would store the reply."""
        if self.pacer is not None:
            # Or waiting requests would gather behind the gate, and all go at once.
            self.pacer.hold(held and not self._closed)
        for replica in self.all:
            replica.gate.hold(held)

    def close(self) -> None:
        """Begin no request any more, and end all waits for one."""
        self._closed = True
        if self.pacer is not None:
            self.pacer.end()
        for replica in self.all:
            replica.gate.close()
            replica.gate.reject_waiting()

    def cancel_pauses(self) -> None:
        """End the tasks that would end pauses."""
        for pause in tuple(self._pauses):
            pause.cancel()


def most_connections() -> int:
    """How many connections one endpoint may have in this process, by the files that it may have open. Half
    of them: there are other endpoints, and other files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _UNBOUNDED_CONNECTIONS if soft == resource.RLIM_INFINITY else max(_LEAST_CONNECTIONS, soft // 2)


def _rank(key: int, salt: int, weight: float) -> float:
    """The place of a replica for a key, least first (Thaler and Ravishankar 1998; weighted)."""
    return -math.log(_fraction(key, salt)) / (weight or 1.0)


def _fraction(key: int, salt: int) -> float:
    """A number above 0, at most 1, that is evenly spread over keys, and independent for each salt (hash)."""
    # A CRC alone is linear, so that two replicas' places would hang together; two rounds of mixing part them.
    mixed = (key ^ salt) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return ((mixed >> 11) + 1) / 9007199254740993
