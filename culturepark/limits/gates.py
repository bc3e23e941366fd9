"""When a request may be sent: a `Gate` limits how many are under way, a `Pacer` how many begin a minute."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable


class Gate:
    """Admits at most `limit` requests at once, first come first served (semaphore). The limit may be
    changed at any time.

    For one event loop. When no request waits, entering and leaving are a comparison and a count each.
    """

    __slots__ = ("_queue", "closed", "held", "in_flight", "limit", "most", "paused", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.waiting = 0
        self.most = 0
        """The most in flight at once since this was last set."""
        self.paused = self.closed = self.held = False
        self._queue: deque[asyncio.Future[bool]] = deque()

    @property
    def free(self) -> bool:
        """Whether `try_enter` would admit a request."""
        return self.in_flight < self.limit and not (self.waiting or self.paused or self.held)

    def try_enter(self) -> bool:
        """Enter if there is room and no request waits for it."""
        if self.in_flight >= self.limit or self.waiting or self.paused or self.held:
            return False
        self.in_flight += 1
        if self.in_flight > self.most:
            self.most = self.in_flight
        return True

    async def enter(self) -> bool:
        """Wait until admitted. False if rejected: then there is nothing to leave."""
        if self.try_enter():
            return True
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._queue.append(future)
        self.waiting += 1
        try:
            return await future
        except asyncio.CancelledError:
            # Admitted and cancelled in the same moment: the room goes to the next.
            if future.done() and not future.cancelled():
                if future.result():
                    self.leave()
            else:
                # Until now it was counted, and may have kept a later request waiting.
                self.waiting -= 1
                self._admit()
            raise

    def leave(self) -> None:
        """Make room for the next request."""
        self.in_flight -= 1
        if self.waiting:
            self._admit()

    def set_limit(self, limit: int) -> None:
        """Change the limit. Requests that were admitted go on."""
        self.limit = limit
        self._admit()

    def pause(self) -> None:
        """Admit no request until `resume`."""
        self.paused = True

    def resume(self) -> None:
        """End a pause, unless the gate was closed."""
        self.paused = self.closed
        if not self.closed:
            self._admit()

    def hold(self, held: bool) -> None:
        """Admit no request for as long as this is so, for a reason that is not the endpoint's."""
        self.held = held
        self._admit()

    def close(self) -> None:
        """Admit no request any more. Those that were admitted go on."""
        self.paused = self.closed = True

    def reject_waiting(self) -> None:
        """End all waits without admission, so that the requests may go elsewhere."""
        while self._queue:
            future = self._queue.popleft()
            if not future.done():
                self.waiting -= 1
                future.set_result(False)

    def _admit(self) -> None:
        while self._queue and self.in_flight < self.limit and not (self.paused or self.held):
            future = self._queue.popleft()
            if future.done():  # cancelled; it is counted out where it waited
                continue
            self.waiting -= 1
            self.in_flight += 1
            future.set_result(True)
        if self.in_flight > self.most:
            self.most = self.in_flight
        if not self.waiting and self._queue:
            self._queue.clear()


class _Bucket:
    """A token bucket: it fills at a rate and holds one second's worth, but at least one unit."""

    def __init__(self, per_minute: float, now_s: float) -> None:
        self.per_s = per_minute / 60
        self.level = max(1.0, self.per_s)
        self._filled_s = now_s

    def fill(self, now_s: float) -> None:
        level = self.level + self.per_s * (now_s - self._filled_s)
        self.level, self._filled_s = min(level, max(1.0, self.per_s)), now_s

    def wait_s(self, least: float) -> float:
        """Seconds until it holds `least`."""
        if self.level >= least:
            return 0.0
        return (least - self.level) / self.per_s if self.per_s else float("inf")


class Pacer:
    """Limits the rates of requests and of LLM tokens a minute (token bucket), first come first served.

    How many tokens a request costs is known only after it: before it, the mean so far is withdrawn, and
    `spent` settles the difference, so the level may fall below zero; then requests wait until it is back.
    """

    def __init__(
        self,
        requests_per_minute: float,
        tokens_per_minute: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A rate of 0 means no limit."""
        self._clock = clock
        now_s = clock()
        self._requests = _Bucket(requests_per_minute, now_s) if requests_per_minute else None
        self._tokens = _Bucket(tokens_per_minute, now_s) if tokens_per_minute else None
        self._mean_tokens = 0.0
        self._held = False
        self._queue: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def set_rates(self, requests_per_minute: float, tokens_per_minute: float) -> None:
        """Change the rates that are limited at all; 0 lets no request through."""
        now_s = self._clock()
        for bucket, rate in ((self._requests, requests_per_minute), (self._tokens, tokens_per_minute)):
            if bucket is not None:
                bucket.fill(now_s)
                bucket.per_s = rate / 60
        self._release()

    def hold(self, held: bool) -> None:
        """Let no request through for as long as this is so."""
        self._held = held
        self._release()

    def end(self) -> None:
        """Limit no rate any more, so that no caller waits: no request will be sent."""
        self._requests = self._tokens = None
        self.hold(False)

    async def acquire(self) -> None:
        """Wait until one more request may be sent."""
        if not self._queue and not self._wait_s():
            self._withdraw()
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(future)
        self._release()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._withdraw(-1)
                self._release()
            raise

    def spent(self, tokens: int) -> None:
        """Settle a request by the tokens that it has cost."""
        if self._tokens is not None:
            self._tokens.level -= tokens - self._mean_tokens
            self._mean_tokens += (tokens - self._mean_tokens) * (0.1 if self._mean_tokens else 1.0)

    def _wait_s(self) -> float:
        now_s, wait_s = self._clock(), float("inf") if self._held else 0.0
        for bucket, least in ((self._requests, 1.0), (self._tokens, 0.0)):
            if bucket is not None:
                bucket.fill(now_s)
                wait_s = max(wait_s, bucket.wait_s(least))
        return wait_s

    def _withdraw(self, count: int = 1) -> None:
        if self._requests is not None:
            self._requests.level -= count
        if self._tokens is not None:
            self._tokens.level -= count * self._mean_tokens

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue:
            if self._queue[0].done():
                self._queue.popleft()
            elif wait_s := self._wait_s():
                if wait_s != float("inf"):
                    # A little late rather than early, which would find nothing.
                    loop = asyncio.get_running_loop()
                    self._timer = loop.call_later(min(wait_s, 3600.0) + 0.001, self._release)
                return
            else:
                self._withdraw()
                self._queue.popleft().set_result(None)
