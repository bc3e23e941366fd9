"""How many requests may be under way at once: decided for all processes together, from what each saw.

Pure: no clock and no I/O, time is an argument. Processes send what they `Seen`; the `Coordinator` runs
one `Knee` for each replica of each model and answers with `Share`s.

Servers like vLLM do not refuse what is too much, they let it wait in silence; so a knee watches latency
against its own floor and keeps the queue that it causes small, after TCP Vegas (Brakmo and Peterson
1995) and BBR (Cardwell et al. 2016). Latencies of language models are noisy, so a floor is the mean of
many replies and never the least one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from culturepark.settings import LimitSettings, ModelSettings

PULSE_S = 0.25
"""How often a process with news says what it saw."""
FORGET_S = 10.0
"""A process that was not heard of for so long loses its share."""
FIRST_LIMIT = 16
"""Requests at once to a replica of which nothing is known."""

_HEADROOM = 1.15
"""The limit over what fits into the server without a queue: enough that it never runs dry."""
_QUEUE_SMALL, _QUEUE_LARGE = 0.05, 0.2
"""Share of the latency that is waiting: below the one grow fast, above the other shrink."""
_PROBE = 0.85
"""A probe's limit, as a share of what fits without a queue."""
_PROBE_DEEPER = 0.6
_STILL_FALLING = 0.2
"""A latency that falls by more than this when a probe goes deeper was a queue's; half of what a queue
that fills both levels would give."""
_PROBE_DEPTH = 5
_PROBE_EVERY = 16
"""A probe loses about a seventh of the rate while it lasts, so one in seventeen loses about 1 %.
They come four times as often while they do not agree with each other."""
_PROBE_LEAST_S = 5.0
_REPLIES_LEAST, _REPLIES_MOST, _ROUNDS_MOST = 16, 512, 16
_ERROR_AIM = 0.05
"""How exact the mean of a round should be; noisier latencies take more replies."""
_CUT = 0.7
_CAUTION_S, _CAUTION = 60.0, 1.03
"""After a refusal: how long growth stays slow, and how slow."""
_BROKEN_S = 2.0
"""No growth for so long after a fault of the server."""
_SETTLE_S = 0.3
"""What a new limit takes to reach all processes and to show in their reports, above a round trip."""

_OWN_S = 0.005
"""What our own busy event loop may add to a latency: no server's queue, and harmless. Without it a client
that is slower than its server would take itself for the queue and hold back for nothing."""

_SLOW, _SLOW_NO_MORE = 3.0, 2.0
"""Times the latency of the other replicas."""
_MUCH_LESS = 0.5
"""Of the replies of the other replicas: a replica that is late, too, is not worth waiting for."""
_FAILING, _FAILING_NO_MORE = 0.5, 0.2
"""Share of calls that fail by the replica's fault."""
_WEIGHTS = (0.0, 0.25, 0.5, 1.0)
"""What a replica's weight climbs when it has recovered, a step a second."""
_FULL = 1.5
"""What a server of our own is asked at once, times what it works on."""
_RATE_S = 5.0
"""The time over which shown rates are averaged."""


class Seen(Struct, frozen=True):
    """What one process saw of one replica of one model since its last report.

    `latency_s` and `latency_sq` are sums over `completed` replies, of seconds and of their squares.
    `retry_after_s` is the longest wait asked for, bounded; `broken` counts 5xx, lost connections and
    time-outs. `in_flight` and `waiting` are counts of this moment, `most` the most in flight since the
    last report. `limit` is the share this process was given, 0 if it was given none. `retried` counts
    requests that were further attempts at one call.
    """

    url: str
    model: str
    completed: int = 0
    latency_s: float = 0.0
    latency_sq: float = 0.0
    refused: int = 0
    retry_after_s: float = 0.0
    broken: int = 0
    in_flight: int = 0
    waiting: int = 0
    most: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    limit: int = 0
    retried: int = 0


class Share(Struct, frozen=True):
    """What one process may do with one replica of one model.

    `limit` is requests at once. `weight` is for routing, 0 to 1; 0 means: only a trial now and then.
    The rates are this process's part of the static limits of the whole model, 0 for no limit.
    """

    url: str
    model: str
    limit: int
    weight: float = 1.0
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0


class _Round:
    """What came in since a moment."""

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
        """Requests at once that need no queue, by Little's law: rate times latency without a queue.

        The rate is known twice, by counting replies and by requests in flight; the lesser one is
        right while the latency has not caught up with a limit that has just grown.
        """
        return base_s * min(self.rate, self.in_flight / self.latency_s)


class Knee:
    """The limit of one replica, settling near the knee of its latency.

    It doubles each round trip (`start`) until replies take longer than the floor, then follows what
    fits without a queue (`steady`), and lowers the limit briefly now and then to see the floor anew
    (`probe`), since prompts grow and servers change.
    """

    def __init__(self, most: int, *, adaptive: bool = True, limit: int = FIRST_LIMIT) -> None:
        self._most = most
        self._adaptive = adaptive
        self._limit = float(limit)
        self._phase = "start"
        self._round: _Round | None = None
        self._round_limit = float(limit)
        self._last: _Round | None = None
        """Of slow start: the round before."""
        self._settled_s = 0.0
        self.floor_s = 0.0
        self._floor_replies = 0
        self._spread = 0.5
        """Standard deviation over mean of a reply's latency."""
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
        """Rounds in a row."""
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
        """What a reply may take before it counts as queued."""
        return self.floor_s + _OWN_S

    def inherit(self, limit: int) -> None:
        """Go on from a limit that another knee had found: no slow start, and a look at the floor soon."""
        self._limit = self._limit + limit if self._phase == "inherited" else float(limit)
        self._phase = "inherited"

    def step(self, now_s: float, seen: Seen, in_flight: int, most: int) -> None:
        """Take a process's report; `in_flight` and `most` are of all processes together."""
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
        """The standard error of a mean of so many latencies, as a share of it."""
        return self._spread / math.sqrt(replies)

    def _grow_to(self, limit: float, now_s: float) -> None:
        if now_s < self._no_growth_until_s:
            return
        if now_s < self._cautious_until_s:
            limit = min(limit, self._limit * _CAUTION)
        self._limit = max(self._limit, min(limit, float(self._most)))

    def _cut(self, now_s: float, retry_after_s: float) -> None:
        """The server refuses: at most one cut a round trip, since one burst is one message."""
        self._no_growth_until_s = max(self._no_growth_until_s, now_s + retry_after_s)
        self._cautious_until_s = max(self._cautious_until_s, now_s + retry_after_s + _CAUTION_S)
        if now_s < self._next_cut_s:
            return
        if self._phase == "probe":
            self._limit = self._probe_from_limit
        self._limit = self._highest = max(1.0, self._limit * _CUT)
        self._phase = "steady"
        self._next_cut_s = now_s + max(self.floor_s * _HEADROOM, 2 * PULSE_S)
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
        if self._floods(this):
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

    def _floods(self, this: _Round) -> bool:
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
            # More queue than we ever wanted: the server has less to give, or a reply takes longer now.
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
        """Lower the limit until the server has no queue, to see what a reply takes then."""
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


class _Process:
    """The latest counts and the granted limit of one process at one replica."""

    def __init__(self) -> None:
        self.in_flight = self.waiting = self.most = 0
        self.granted = 0


class _Replica:
    """One replica of one model, as all processes see it."""

    def __init__(self, url: str, model: str, knee: Knee, now_s: float, *, compared: bool = True) -> None:
        self.url, self.model, self.knee = url, model, knee
        self.compared = compared
        self.processes: dict[str, _Process] = {}
        self.in_flight = self.waiting = self.most = 0
        self.refused = self.broken = self.retried = 0
        self.tokens_in_all = 0
        self.failing = 0.0
        self.latency_s = 0.0
        self.active_s = now_s
        """When a reply came last, or when it had nothing to do."""
        self.step = len(_WEIGHTS) - 1
        self.step_s = now_s
        self.rates_s = now_s
        self.requests = self.tokens = 0.0

    @property
    def weight(self) -> float:
        return _WEIGHTS[self.step]

    def demand(self) -> int:
        return self.in_flight + self.waiting

    def take(self, process: str, seen: Seen, now_s: float) -> None:
        if process not in self.processes:
            self.processes[process] = _Process()
            if seen.limit:
                self.knee.inherit(seen.limit)
        one, idle = self.processes[process], not self.in_flight
        self.in_flight += seen.in_flight - one.in_flight
        self.waiting += seen.waiting - one.waiting
        self.most += seen.most - one.most
        one.in_flight, one.waiting, one.most = seen.in_flight, seen.waiting, seen.most
        self.refused += seen.refused
        self.broken += seen.broken
        self.retried += seen.retried
        slow_to_judge = 4 if self.step else 1  # the few trials of one that is left out count for more
        if ended := seen.completed + seen.broken:
            self.failing += (seen.broken / ended - self.failing) * ended / (ended + slow_to_judge)
        if seen.completed:
            mean = seen.latency_s / seen.completed
            part = seen.completed / (seen.completed + slow_to_judge) if self.latency_s else 1.0
            self.latency_s += (mean - self.latency_s) * part
        if seen.completed or seen.broken or idle or not self.in_flight:
            self.active_s = now_s
        if now_s > self.rates_s:
            fade = math.exp((self.rates_s - now_s) / _RATE_S)
            self.requests, self.tokens, self.rates_s = self.requests * fade, self.tokens * fade, now_s
        self.requests += seen.completed
        self.tokens += seen.prompt_tokens + seen.completion_tokens
        self.tokens_in_all += seen.prompt_tokens + seen.completion_tokens
        self.knee.step(now_s, seen, self.in_flight, self.most)

    def forget(self, process: str) -> None:
        if one := self.processes.pop(process, None):
            self.in_flight -= one.in_flight
            self.waiting -= one.waiting
            self.most -= one.most

    def judge(self, others: Sequence[_Replica], now_s: float) -> None:
        """Set the weight: nothing when it is broken or far slower than the others, back in steps.

        One that is not `compared` may be slower: it is a server of our own, whose replies take as long as it
        has others at once.
        """
        peers = [other.latency_s for other in others if other is not self and other.latency_s]
        usual_s = statistics.median(peers) if peers else math.inf
        well = self.step > 0
        bar, slow = (_FAILING, _SLOW) if well else (_FAILING_NO_MORE, _SLOW_NO_MORE)
        silent = now_s - self.active_s > _SLOW * usual_s + 2 * PULSE_S
        late = self.latency_s > slow * usual_s
        rest = [other for other in others if other is not self and other.step]
        if late and well and rest and all(other.waiting for other in rest):
            # The others have all that they can do. One that is late only since it has more at once than they
            # have answers as many as they do, and without it there would be fewer.
            late = self.requests < _MUCH_LESS * statistics.median(other.requests for other in rest)
        if self.failing > bar or (self.compared and (late or silent)):
            self.step, self.step_s = 0, now_s
        elif self.step < len(_WEIGHTS) - 1 and now_s - self.step_s >= 1.0:
            self.step, self.step_s = self.step + 1, now_s


class Coordinator:
    """Takes what processes saw, and shares out what they may do.

    The limits handed out for a replica add up to its knee's limit, but for the one request that each
    process is always allowed: a process is given more only once others have been told to do with less.
    What one with nothing to ask is allowed is taken from nobody, as long as the static maximum is kept.

    `known` is by address what a replica is to be asked at once, where that need not be found out.
    """

    def __init__(self, limits: LimitSettings, known: Mapping[str, int] | None = None) -> None:
        self._limits = limits
        self._known: Mapping[str, int] = known if known and limits.adaptive else {}
        self._models: dict[str, dict[str, _Replica]] = {}
        self._heard_s: dict[str, float] = {}

    def take(self, process: str, seen: Iterable[Seen], now_s: float) -> tuple[Share, ...]:
        """Take a process's report; its shares, of the replicas it reported."""
        self._heard_s[process] = now_s
        for quiet in [name for name, heard_s in self._heard_s.items() if now_s - heard_s > FORGET_S]:
            self._forget(quiet)
        touched: dict[str, list[_Replica]] = {}
        for one in seen:
            replicas = self._models.setdefault(one.model, {})
            if one.url not in replicas:
                replicas[one.url] = self._replica(one, now_s)
            replicas[one.url].take(process, one, now_s)
            touched.setdefault(one.model, []).append(replicas[one.url])
        return tuple(
            share
            for model, replicas in touched.items()
            for share in self._shares(process, list(self._models[model].values()), replicas, now_s)
        )

    def _replica(self, seen: Seen, now_s: float) -> _Replica:
        most, known = self._limits.requests_in_flight, self._known.get(seen.url)
        if known:
            knee = Knee(min(most, known), adaptive=False)
        else:
            knee = Knee(most, adaptive=self._limits.adaptive)
        return _Replica(seen.url, seen.model, knee, now_s, compared=known is None)

    def _forget(self, process: str) -> None:
        del self._heard_s[process]
        for replicas in self._models.values():
            for replica in replicas.values():
                replica.forget(process)

    def _shares(
        self, process: str, replicas: list[_Replica], asked: list[_Replica], now_s: float
    ) -> Iterable[Share]:
        for replica in replicas:
            replica.judge(replicas, now_s)
        none_well = not any(replica.step for replica in replicas)
        limits = self._replica_limits(replicas)
        spare = max(0, self._limits.requests_in_flight - sum(limits.values())) // len(replicas)
        everyone = sum(len(replica.processes) + replica.demand() for replica in replicas)
        mine = sum(1 + r.processes[process].in_flight + r.processes[process].waiting for r in asked)
        part = min(1.0, mine / everyone)
        for replica in asked:
            one = replica.processes[process]
            processes, limit = list(replica.processes.values()), limits[replica.url]
            wanted = [p.in_flight + p.waiting for p in processes]
            total = limit + min(wanted.count(0), spare)
            fair = divide(total, wanted)[processes.index(one)]
            others = sum(max(p.granted, p.in_flight) for p in processes if p is not one)
            # Less at once, more only from what the others have let go.
            one.granted = given = max(1, min(limit, fair, max(one.granted, total - others)))
            yield Share(
                replica.url,
                replica.model,
                given,
                1.0 if none_well else replica.weight,
                self._limits.requests_per_minute * part,
                self._limits.tokens_per_minute * part,
            )

    def _replica_limits(self, replicas: list[_Replica]) -> dict[str, int]:
        """Each replica's limit, cut so that together they keep the static maximum."""
        limits = [replica.knee.limit if replica.step else 1 for replica in replicas]
        if sum(limits) > self._limits.requests_in_flight:
            fair = divide(self._limits.requests_in_flight, [replica.demand() for replica in replicas])
            limits = [min(limit, part) for limit, part in zip(limits, fair, strict=True)]
        return {replica.url: limit for replica, limit in zip(replicas, limits, strict=True)}

    def view(self) -> list[dict[str, Any]]:
        """Where each replica stands, as plain data, in the order of model and address."""
        return [
            {
                "url": replica.url,
                "model": replica.model,
                "limit": replica.knee.limit if replica.step else len(replica.processes),
                "in_flight": replica.in_flight,
                "waiting": replica.waiting,
                "requests_s": replica.requests / _RATE_S,
                "tokens_s": replica.tokens / _RATE_S,
                "latency_s": replica.latency_s,
                "refused": replica.refused,
                "broken": replica.broken,
                "retried": replica.retried,
                "tokens": replica.tokens_in_all,
                "weight": replica.weight,
            }
            for _, replicas in sorted(self._models.items())
            for _, replica in sorted(replicas.items())
        ]


def known_limits(models: Iterable[ModelSettings]) -> dict[str, int]:
    """By address what each server of the embedded models among these is to be asked at once: all that it can
    work on and half as much again, so that it never runs dry.

    A limit found out from latencies would be too low: what a CPU decodes together takes longer the more there
    is of it, long before it stops getting done faster.
    """
    return {
        url: math.ceil(one.parallel * _FULL)
        for one in models
        if one.engine == "embedded" and one.parallel
        for url in one.base_urls
    }


def divide(total: int, wanted: Sequence[int]) -> list[int]:
    """`total` in whole parts, each at least 1, in proportion to what is wanted; largest remainders first."""
    spare = max(0, total - len(wanted))
    # Who wants nothing now counts for a little, so that a total nobody wants is shared out too.
    weights = [one + 0.1 for one in wanted]
    exact = [spare * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: spare - sum(parts)]:
        parts[i] += 1
    return [1 + part for part in parts]
