"""How many requests may be under way at once: decided for all processes together, from what each saw.

Pure: no clock and no I/O, time is an argument. Processes send what they `Seen`; the `Coordinator` runs
one `AdaptiveLimit` for each replica of each model and answers with `Share`s.
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
"""A process that was not heard of for so long loses its share."""
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


class _Process:
    """The latest counts and the granted limit of one process at one replica."""

    def __init__(self) -> None:
        self.in_flight = self.waiting = self.most = 0
        self.granted = 0


class _Replica:
    """One replica of one model, as all processes see it."""

    def __init__(
        self, url: str, model: str, knee: AdaptiveLimit, now_s: float, *, compared: bool = True
    ) -> None:
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
        silent = now_s - self.active_s > _SLOW * usual_s + 2 * REPORT_EVERY_S
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
            knee = AdaptiveLimit(min(most, known), adaptive=False)
        else:
            knee = AdaptiveLimit(most, adaptive=self._limits.adaptive)
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
