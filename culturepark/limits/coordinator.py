"""How many requests may be under way at once: decided for all processes together, from their load reports.

Pure: no clock and no I/O, time is an argument. A process sends a `Seen` for each replica that it calls; the
`Coordinator` has one `AdaptiveLimit` for each replica of each model and answers with `Share`s.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from culturepark.limits.adaptive import REPORT_EVERY_S, AdaptiveLimit
from culturepark.messages import Seen, Share
from culturepark.settings import LimitSettings, ModelSettings

FORGET_S = 10.0
"""A process that has sent no report for this many seconds loses its shares (failure detector)."""
_SLOW, _NOT_SLOW = 3.0, 2.0
"""A replica is left out when its latency, as a multiple of the others', is above the first, and comes back
when it is below the second (hysteresis)."""
_FAR_FEWER = 0.5
"""While all other replicas have queues, a slow one is left out only if it gives fewer replies than this part
of theirs."""
_FAILING, _NOT_FAILING = 0.5, 0.2
"""A replica is left out when more than the first part of its calls fails by its own fault, and comes back
when less than the second does (hysteresis)."""
_WEIGHTS = (0.0, 0.25, 0.5, 1.0)
"""The weights through which a replica that has recovered comes back, one step a second."""
_OVERBOOKED = 1.5
"""Requests under way at a server of our own, as a multiple of those that it decodes together."""
_RATE_S = 5.0
"""Seconds over which shown rates are averaged (exponential moving average)."""


class _Process:
    """The latest counts and the granted limit of one process at one replica."""

    def __init__(self) -> None:
        self.in_flight = self.waiting = self.most = 0
        self.granted = 0


class _Replica:
    """One replica of one model, as all processes see it."""

    def __init__(
        self, url: str, model: str, adaptive: AdaptiveLimit, now_s: float, *, compared: bool = True
    ) -> None:
        self.url, self.model, self.adaptive = url, model, adaptive
        self.compared = compared
        self.processes: dict[str, _Process] = {}
        self.in_flight = self.waiting = self.most = 0
        self.refused = self.broken = self.retried = 0
        self.tokens_in_all = 0
        self.failing = 0.0
        self.latency_s = 0.0
        self.active_s = now_s
        """When the last reply came, or when it last had nothing to do."""
        self.step = len(_WEIGHTS) - 1
        """Its place in `_WEIGHTS`: 0 while it is left out."""
        self.step_s = now_s
        self.rates_s = now_s
        self.requests = self.tokens = 0.0

    @property
    def weight(self) -> float:
        return _WEIGHTS[self.step]

    def demand(self) -> int:
        return self.in_flight + self.waiting

    def update(self, process: str, seen: Seen, now_s: float) -> None:
        """Add one process's report."""
        if process not in self.processes:
            self.processes[process] = _Process()
            if seen.limit:
                self.adaptive.inherit(seen.limit)
        one, idle = self.processes[process], not self.in_flight
        self.in_flight += seen.in_flight - one.in_flight
        self.waiting += seen.waiting - one.waiting
        self.most += seen.most - one.most
        one.in_flight, one.waiting, one.most = seen.in_flight, seen.waiting, seen.most
        self.refused += seen.refused
        self.broken += seen.broken
        self.retried += seen.retried
        prior = 4 if self.step else 1  # the few trials of a replica that is left out count for more
        if ended := seen.completed + seen.broken:
            self.failing += (seen.broken / ended - self.failing) * ended / (ended + prior)
        if seen.completed:
            mean = seen.latency_s / seen.completed
            part = seen.completed / (seen.completed + prior) if self.latency_s else 1.0
            self.latency_s += (mean - self.latency_s) * part
        if seen.completed or seen.broken or idle or not self.in_flight:
            self.active_s = now_s
        if now_s > self.rates_s:
            fade = math.exp((self.rates_s - now_s) / _RATE_S)
            self.requests, self.tokens, self.rates_s = self.requests * fade, self.tokens * fade, now_s
        self.requests += seen.completed
        self.tokens += seen.prompt_tokens + seen.completion_tokens
        self.tokens_in_all += seen.prompt_tokens + seen.completion_tokens
        self.adaptive.observe(now_s, seen, self.in_flight, self.most)

    def forget(self, process: str) -> None:
        if one := self.processes.pop(process, None):
            self.in_flight -= one.in_flight
            self.waiting -= one.waiting
            self.most -= one.most

    def judge(self, others: Sequence[_Replica], now_s: float) -> None:
        """Set the weight: 0 when it is broken or far slower than the others (circuit breaker), then back in
        steps.

        One that is not `compared` may be slower: it is a server of our own, whose latency grows with the
        requests that it decodes together.
        """
        peers = [other.latency_s for other in others if other is not self and other.latency_s]
        usual_s = statistics.median(peers) if peers else math.inf
        healthy = self.step > 0
        bar, slow = (_FAILING, _SLOW) if healthy else (_NOT_FAILING, _NOT_SLOW)
        silent = now_s - self.active_s > _SLOW * usual_s + 2 * REPORT_EVERY_S
        late = self.latency_s > slow * usual_s
        rest = [other for other in others if other is not self and other.step]
        if late and healthy and rest and all(other.waiting for other in rest):
            # The others are at their limits. A replica that is slow only since it has more requests at once
            # gives as many replies as they do, and without it there would be fewer.
            late = self.requests < _FAR_FEWER * statistics.median(other.requests for other in rest)
        if self.failing > bar or (self.compared and (late or silent)):
            self.step, self.step_s = 0, now_s
        elif self.step < len(_WEIGHTS) - 1 and now_s - self.step_s >= 1.0:
            self.step, self.step_s = self.step + 1, now_s


class Coordinator:
    """Receives the load reports of all processes, and divides each replica's limit among them.

    The shares of a replica add up to its adaptive limit, but for the one request that each process is always
    allowed: a process is given more only once others have been told to do with less. What an idle process is
    allowed reduces no other's share, as long as the static maximum is kept.

    `known` has by address the limit of a replica for which it need not be found out.
    """

    def __init__(self, limits: LimitSettings, known: Mapping[str, int] | None = None) -> None:
        self._limits = limits
        self._known: Mapping[str, int] = known if known and limits.adaptive else {}
        self._models: dict[str, dict[str, _Replica]] = {}
        self._last_report_s: dict[str, float] = {}

    def update(self, process: str, seen: Iterable[Seen], now_s: float) -> tuple[Share, ...]:
        """Add a process's report; returns its shares of the replicas that it reported."""
        self._last_report_s[process] = now_s
        for silent in [name for name, last_s in self._last_report_s.items() if now_s - last_s > FORGET_S]:
            self._forget(silent)
        touched: dict[str, list[_Replica]] = {}
        for one in seen:
            replicas = self._models.setdefault(one.model, {})
            if one.url not in replicas:
                replicas[one.url] = self._replica(one, now_s)
            replicas[one.url].update(process, one, now_s)
            touched.setdefault(one.model, []).append(replicas[one.url])
        return tuple(
            share
            for model, replicas in touched.items()
            for share in self._shares(process, list(self._models[model].values()), replicas, now_s)
        )

    def _replica(self, seen: Seen, now_s: float) -> _Replica:
        most, known = self._limits.requests_in_flight, self._known.get(seen.url)
        if known:
            adaptive = AdaptiveLimit(min(most, known), adaptive=False)
        else:
            adaptive = AdaptiveLimit(most, adaptive=self._limits.adaptive)
        return _Replica(seen.url, seen.model, adaptive, now_s, compared=known is None)

    def _forget(self, process: str) -> None:
        del self._last_report_s[process]
        for replicas in self._models.values():
            for replica in replicas.values():
                replica.forget(process)

    def _shares(
        self, process: str, replicas: list[_Replica], asked: list[_Replica], now_s: float
    ) -> Iterable[Share]:
        for replica in replicas:
            replica.judge(replicas, now_s)
        none_healthy = not any(replica.step for replica in replicas)
        limits = self._replica_limits(replicas)
        spare = max(0, self._limits.requests_in_flight - sum(limits.values())) // len(replicas)
        total_demand = sum(len(replica.processes) + replica.demand() for replica in replicas)
        mine = sum(1 + r.processes[process].in_flight + r.processes[process].waiting for r in asked)
        part = min(1.0, mine / total_demand)
        for replica in asked:
            one = replica.processes[process]
            processes, limit = list(replica.processes.values()), limits[replica.url]
            wanted = [p.in_flight + p.waiting for p in processes]
            total = limit + min(wanted.count(0), spare)
            fair = divide(total, wanted)[processes.index(one)]
            others = sum(max(p.granted, p.in_flight) for p in processes if p is not one)
            # Less at once; more only from what the others have given back.
            one.granted = given = max(1, min(limit, fair, max(one.granted, total - others)))
            yield Share(
                replica.url,
                replica.model,
                given,
                1.0 if none_healthy else replica.weight,
                self._limits.requests_per_minute * part,
                self._limits.tokens_per_minute * part,
            )

    def _replica_limits(self, replicas: list[_Replica]) -> dict[str, int]:
        """Each replica's limit, cut so that together they keep the static maximum."""
        limits = [replica.adaptive.limit if replica.step else 1 for replica in replicas]
        if sum(limits) > self._limits.requests_in_flight:
            fair = divide(self._limits.requests_in_flight, [replica.demand() for replica in replicas])
            limits = [min(limit, part) for limit, part in zip(limits, fair, strict=True)]
        return {replica.url: limit for replica, limit in zip(replicas, limits, strict=True)}

    def view(self) -> list[dict[str, Any]]:
        """The state of each replica, as plain data, in the order of model and address."""
        return [
            {
                "url": replica.url,
                "model": replica.model,
                "limit": replica.adaptive.limit if replica.step else len(replica.processes),
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
    """By address the limit of each server of the embedded models among these: as many requests as it decodes
    together and half as many again, so that it never runs dry.

    A limit found out from latencies would be too low: on a CPU latency grows with the requests that are
    decoded together, long before the rate stops growing.
    """
    return {
        url: math.ceil(one.parallel * _OVERBOOKED)
        for one in models
        if one.engine == "embedded" and one.parallel
        for url in one.base_urls
    }


def divide(total: int, wanted: Sequence[int]) -> list[int]:
    """`total` in whole parts, each at least 1, in proportion to the demands (largest remainder method)."""
    spare = max(0, total - len(wanted))
    # A demand of 0 counts for a little, so that a total that none demands is divided, too.
    weights = [one + 0.1 for one in wanted]
    exact = [spare * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: spare - sum(parts)]:
        parts[i] += 1
    return [1 + part for part in parts]
