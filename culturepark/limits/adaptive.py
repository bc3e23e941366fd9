"""How many requests at once serve one replica best, found out from the latency of its replies (adaptive
concurrency limit).

Pure: no clock and no I/O, time is an argument.

Servers like vLLM do not refuse requests that are too many, they queue them in silence; so the limit compares
latency with a floor, the latency without a queue, and keeps the queue that it causes small, after TCP Vegas
(Brakmo and Peterson 1995) and BBR (Cardwell et al. 2016). Latencies of language models are noisy, so a floor
is the mean of many replies and never the least one.
"""

from __future__ import annotations

import math

from culturepark.messages import Seen

REPORT_EVERY_S = 0.25
"""Seconds between the load reports of a process that has news."""
FIRST_LIMIT = 16
"""Requests at once to a replica of which nothing is known yet."""

_HEADROOM = 1.15
"""The limit, as a multiple of the requests that need no queue: enough that the server never runs dry."""
_QUEUE_SMALL, _QUEUE_LARGE = 0.05, 0.2
"""The part of the latency that is spent in a queue: below the first the limit grows fast, above the second it
shrinks."""
_PROBE = 0.85
"""A probe's limit, as a part of the requests that need no queue."""
_PROBE_DEEPER = 0.6
"""A deeper probe's limit, as a part of the requests in flight."""
_STILL_FALLING = 0.2
"""A latency that falls by more than this when a probe goes deeper was a queue's; half of what a queue
that fills both levels would give."""
_PROBE_DEPTH = 5
"""A probe lowers the limit at most this many times."""
_PROBE_EVERY = 16
"""Time between probes, as a multiple of their length. A probe loses about a seventh of the rate while it
lasts, so one in seventeen loses about 1 %.
They come four times as often while they do not agree with each other."""
_PROBE_LEAST_S = 5.0
"""Seconds between probes, at least."""
_REPLIES_LEAST, _REPLIES_MOST, _ROUNDS_MOST = 16, 512, 16
"""The least and the most replies of a round, and the most round trips that it lasts."""
_ERROR_AIM = 0.05
"""The standard error that a round's mean latency should have, as a part of it; noisier latencies need more
replies."""
_CUT = 0.7
"""The limit after a cut, as a part of the limit before (multiplicative decrease)."""
_CAUTION_S, _CAUTION = 60.0, 1.03
"""Seconds of caution after a refusal, and the factor by which the limit grows at most a round meanwhile."""
_BROKEN_S = 2.0
"""Seconds without growth after a fault of the server."""
_SETTLE_S = 0.3
"""Seconds until a new limit has reached all processes and shows in their reports, beside a round trip."""

_CLIENT_S = 0.005
"""Seconds that our own busy event loop may add to a latency: no server's queue, and harmless. Without it a
client that is slower than its server would mistake its own delay for a queue and hold back for nothing."""


class _Round:
    """The replies and requests since a moment, over which means are formed."""

    def __init__(self, began_s: float) -> None:
        self.began_s = self.now_s = began_s
        self.replies = 0
        self.latency_sum_s = 0.0
        self.latency_sq = 0.0
        self.in_flight_s = 0.0
        self.most = 0

    @property
    def rate(self) -> float:
        return self.replies / self.elapsed_s if self.elapsed_s else math.inf

    def add(self, now_s: float, seen: Seen, in_flight: int, most: int) -> None:
        if now_s > self.now_s:
            self.in_flight_s += in_flight * (now_s - self.now_s)
            self.now_s = now_s
        self.replies += seen.completed
        self.latency_sum_s += seen.latency_s
        self.latency_sq += seen.latency_sq
        self.most = max(self.most, most)

    @property
    def elapsed_s(self) -> float:
        return self.now_s - self.began_s

    @property
    def latency_s(self) -> float:
        return self.latency_sum_s / self.replies

    @property
    def in_flight(self) -> float:
        return self.in_flight_s / self.elapsed_s if self.elapsed_s else 0.0

    def fits(self, base_s: float) -> float:
        """Requests at once that need no queue: rate times latency without a queue (Little's law).

        The rate is known twice, by counting replies and by requests in flight; the lesser one is
        right while the latency has not caught up with a limit that has just grown.
        """
        return base_s * min(self.rate, self.in_flight / self.latency_s)


class AdaptiveLimit:
    """The limit of one replica: near the number of requests from which on more only wait longer.

    It doubles each round trip (slow start, `start`) until latency rises above the floor, then follows the
    number of requests that need no queue (`steady`), and is lowered briefly now and then to measure the floor
    anew (`probe`), since prompts grow and servers change.
    """

    def __init__(self, most: int, *, adaptive: bool = True, limit: int = FIRST_LIMIT) -> None:
        self._most = most
        self._adaptive = adaptive
        self._limit = float(limit)
        self._phase = "start"
        self._round: _Round | None = None
        self._round_limit = float(limit)
        self._last: _Round | None = None
        """The round before, in slow start."""
        self._settled_s = 0.0
        self.floor_s = 0.0
        self._floor_replies = 0
        self._spread = 0.5
        """Standard deviation of latencies over their mean (coefficient of variation)."""
        self._no_growth_until_s = 0.0
        self._cautious_until_s = 0.0
        self._next_cut_s = 0.0
        self._probe_began_s = 0.0
        self._probe_depth = 0
        self._probe_every: float = _PROBE_EVERY / 4
        self._probe_from_start = False
        self._probe_against_s = 0.0
        self._probe_from: _Round | None = None
        self._probe_from_limit = 0.0
        self._next_probe_s = self._early_probe_s = 0.0
        self._long_queues = self._short_queues = 0
        """Rounds in a row with a long, or a short, queue."""
        self._highest = 0.0
        """The highest limit since the last probe."""

    @property
    def limit(self) -> int:
        """Requests at once, all processes together."""
        if not self._adaptive:
            return self._most
        return max(1, min(self._most, round(self._limit)))

    @property
    def base_s(self) -> float:
        """Seconds of latency above which a reply counts as queued."""
        return self.floor_s + _CLIENT_S

    def inherit(self, limit: int) -> None:
        """Go on from a limit that another coordinator had found: no slow start, and a probe soon."""
        self._limit = self._limit + limit if self._phase == "inherited" else float(limit)
        self._phase = "inherited"

    def observe(self, now_s: float, seen: Seen, in_flight: int, most: int) -> None:
        """Add a process's report; `in_flight` and `most` are of all processes together."""
        if not self._adaptive:
            return
        if seen.broken:
            self._no_growth_until_s = max(self._no_growth_until_s, now_s + _BROKEN_S)
        if seen.refused:
            self._cut(now_s, seen.retry_after_s)
        if now_s < self._settled_s:
            return
        if self._round is None:
            self._round, self._round_limit = _Round(now_s), self._limit
            return
        this = self._round
        this.add(now_s, seen, in_flight, most)
        if self._phase == "start":
            self._slow_start(this, seen.completed)
            return
        if not self._complete(this):
            return
        self._round = None
        self._learn_spread(this)
        if self._phase == "probe":
            self._probed(this)
        else:
            self._steady(this)

    def _complete(self, this: _Round) -> bool:
        """Whether a round holds enough replies for its mean to mean something."""
        if this.replies < _REPLIES_LEAST or this.elapsed_s < max(this.latency_s, 0.1):
            return False
        # Whether slow start was right to end can be told from fewer replies.
        aim = 2 * _ERROR_AIM if self._phase == "probe" and self._probe_from_start else _ERROR_AIM
        need = (self._spread / aim) ** 2
        return this.replies >= min(need, _REPLIES_MOST) or this.elapsed_s > _ROUNDS_MOST * this.latency_s

    def _learn_spread(self, this: _Round) -> None:
        mean = this.latency_s
        spread = math.sqrt(max(0.0, this.latency_sq / this.replies - mean * mean)) / mean if mean else 0.0
        self._spread += 0.3 * (spread - self._spread)

    def _error(self, replies: int) -> float:
        """The standard error of a mean of so many latencies, as a part of it."""
        return self._spread / math.sqrt(replies)

    def _grow_to(self, limit: float, now_s: float) -> None:
        if now_s < self._no_growth_until_s:
            return
        if now_s < self._cautious_until_s:
            limit = min(limit, self._limit * _CAUTION)
        self._limit = max(self._limit, min(limit, float(self._most)))

    def _cut(self, now_s: float, retry_after_s: float) -> None:
        """The server refuses requests: at most one cut a round trip, since one burst is one signal."""
        self._no_growth_until_s = max(self._no_growth_until_s, now_s + retry_after_s)
        self._cautious_until_s = max(self._cautious_until_s, now_s + retry_after_s + _CAUTION_S)
        if now_s < self._next_cut_s:
            return
        if self._phase == "probe":
            self._limit = self._probe_from_limit
        self._limit = self._highest = max(1.0, self._limit * _CUT)
        self._phase = "steady"
        self._next_cut_s = now_s + max(self.floor_s * _HEADROOM, 2 * REPORT_EVERY_S)
        self._restart(self._next_cut_s)

    def _restart(self, settled_s: float) -> None:
        self._round = None
        self._settled_s = settled_s

    # --- slow start

    def _slow_start(self, this: _Round, completed: int) -> None:
        now_s = this.now_s
        used = this.most >= 0.9 * self._round_limit
        if used:
            self._grow_to(min(self._limit + completed, 2 * self._round_limit), now_s)
        if this.replies < _REPLIES_LEAST:
            return
        mean = this.latency_s
        if self._is_saturated(this):
            self._learn_spread(this)
            self._probe(this)
            return
        if this.replies < self._round_limit or this.elapsed_s < max(mean, 0.1):
            return
        self._learn_spread(this)
        if not self.floor_s or mean < self.floor_s * (1 - 2 * self._error(this.replies)):
            self.floor_s, self._floor_replies = mean, this.replies
        else:
            known = min(self._floor_replies, _REPLIES_MOST)
            new = min(this.replies, _REPLIES_MOST)
            self.floor_s += (mean - self.floor_s) * new / (known + new)
            self._floor_replies = known + new
        self._last, self._round, self._round_limit = this, _Round(now_s), self._limit

    def _is_saturated(self, this: _Round) -> bool:
        """Whether more requests only wait longer.

        Latency alone would mislead: of requests that have just begun, the quick ones end first, so a
        mean of noisy latencies rises while a limit grows. The rate must have stopped growing, too.
        """
        if not self.floor_s or not self._last:
            return False
        error = self._error(this.replies)
        slower = this.latency_s > self.base_s * (1 + _QUEUE_LARGE + 0.05 + 3 * error)
        return slower and this.rate < 1.25 * self._last.rate

    # --- steady

    def _steady(self, this: _Round) -> None:
        now_s, mean = this.now_s, this.latency_s
        if self._phase == "inherited" or not self.floor_s:
            self.floor_s = self.floor_s or mean
            self._phase = "steady"
            self._probe(this)
            return
        if mean < self.floor_s:
            self.floor_s += (mean - self.floor_s) * (1.0 if mean < 0.8 * self.floor_s else 0.3)
        queue = 1 - self.base_s / mean
        target = _HEADROOM * this.in_flight * self.base_s / mean
        used = this.most >= 0.9 * self._round_limit
        long = queue > _QUEUE_LARGE + 1.5 * self._error(this.replies)
        self._long_queues = self._long_queues + 1 if long else 0
        self._short_queues = self._short_queues + 1 if queue < _QUEUE_SMALL else 0
        if long:
            # A longer queue than any we wanted: the server has become slower, or a reply takes longer now.
            self._limit = max(1.0, min(self._limit, max(target, self._limit * _CUT)))
            self._restart(now_s + mean + _SETTLE_S)
        elif used and self._short_queues > 1:
            self._grow_to(self._limit * 1.25, now_s)
            self._restart(now_s + mean + _SETTLE_S)  # so that the next round shows what it did
        elif used:
            moved = self._limit + 0.5 * (target - self._limit)
            if moved > self._limit:
                self._grow_to(moved, now_s)
            else:
                self._limit = max(1.0, moved)
        self._highest = max(self._highest, self._limit)
        # A limit that only falls may be chasing a floor that has risen.
        doubtful = self._long_queues > 1 or self._limit < (0.9 - self._error(this.replies)) * self._highest
        if (used and now_s >= self._next_probe_s) or (doubtful and now_s >= self._early_probe_s):
            self._probe(this)

    # --- probing the floor

    def _probe(self, this: _Round) -> None:
        """Lower the limit until the server has no queue, to measure the latency without one."""
        self._probe_from_start = self._phase == "start"
        self._phase, self._probe_depth = "probe", 1
        self._probe_began_s = this.now_s
        self._probe_from, self._probe_from_limit = this, self._limit
        self._probe_against_s = self.floor_s
        level = 0.5 * this.in_flight if self._probe_from_start else _PROBE * this.fits(self.base_s)
        self._probe_at(level, this)

    def _probe_at(self, level: float, this: _Round) -> None:
        self._limit = max(1.0, min(level, self._limit))
        self._restart(this.now_s + this.latency_s + _SETTLE_S)

    def _probed(self, this: _Round) -> None:
        now_s, mean = this.now_s, this.latency_s
        before = self._probe_from
        assert before is not None  # set with the phase
        differs = mean / self._probe_against_s - 1
        if self._probe_depth == 1:
            more = abs(differs) > max(0.1, 3 * self._error(this.replies))
            if more and differs > 0 and not self._probe_from_start:
                # Not if the lower limit has changed nothing: then there was no queue before, either.
                lowered = this.in_flight / before.in_flight
                more = lowered > 0.9 or mean / before.latency_s < (1 + lowered) / 2
        else:
            more = differs < -_STILL_FALLING
        if more and self._probe_depth < _PROBE_DEPTH:
            # Either a reply takes another time than it did, or there is a queue still: a queue
            # would be shorter, and its latency less, at a lower limit.
            self._probe_depth += 1
            self._probe_began_s = now_s
            self._probe_against_s = mean
            self._probe_at(_PROBE_DEEPER * this.in_flight, this)
            return
        if self._probe_depth > 1 or abs(differs) <= 0.1:
            mean = min(mean, (mean + self._probe_against_s) / 2)
        self.floor_s = mean
        self._floor_replies = this.replies
        length_s = now_s - self._probe_began_s
        agrees = self._probe_depth == 1 and abs(differs) <= 0.1
        self._probe_every = min(2 * self._probe_every, _PROBE_EVERY) if agrees else _PROBE_EVERY / 4
        self._next_probe_s = now_s + max(_PROBE_LEAST_S, self._probe_every * length_s)
        self._early_probe_s = now_s + 3 * length_s
        if before.latency_s < self.base_s * (1 + _QUEUE_SMALL):
            # There had been no queue.
            self._limit = self._probe_from_limit
            careful = now_s < self._cautious_until_s or not self._probe_from_start
            self._phase = "steady" if careful else "start"
        else:
            fits = max(_HEADROOM * before.fits(self.base_s), self._limit)
            self._limit, self._phase = min(fits, self._probe_from_limit), "steady"
        self._last = None
        self._long_queues = 0
        self._highest = self._limit
        self._restart(now_s + mean + _SETTLE_S)
