"""The adaptive limit against a simulated server in virtual time, and the shares of the coordinator."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culturepark.limits.adaptive import FIRST_LIMIT, REPORT_EVERY_S, AdaptiveLimit
from culturepark.limits.coordinator import FORGET_S, Coordinator, divide
from culturepark.messages import Seen
from culturepark.settings import LimitSettings

Time = Callable[[float, random.Random], float]
"""Seconds a reply takes without a queue, at a moment."""


def fixed(seconds: float) -> Time:
    return lambda now, dice: seconds


def lognormal(seconds: float, sigma: float) -> Time:
    """With a mean of `seconds`."""
    return lambda now, dice: seconds * dice.lognormvariate(-sigma * sigma / 2, sigma)


class Client:
    """One process with `demand` dialogues, each of which calls again as soon as it has its reply."""

    def __init__(self, demand: int) -> None:
        self.demand = demand
        self.limit = 2
        self.paused_s = 0.0
        self.in_flight = self.most = 0
        self.granted = 0
        self.reset()

    def reset(self) -> None:
        self.completed = self.refused = 0
        self.latency_s = self.latency_sq = self.asked_s = 0.0
        self.most = self.in_flight

    def seen(self) -> Seen:
        waiting = self.demand - self.in_flight
        seen = Seen(
            "u",
            "m",
            completed=self.completed,
            latency_s=self.latency_s,
            latency_sq=self.latency_sq,
            refused=self.refused,
            retry_after_s=self.asked_s,
            in_flight=self.in_flight,
            waiting=waiting,
            most=self.most,
            limit=self.granted,
        )
        self.reset()
        return seen


class World:
    """Clients, a coordinator and a server that works on `capacity` requests and lets others wait, or
    refuses them if it `refuses`. With `client_s`, a process needs so long of CPU for each reply."""

    def __init__(
        self,
        time: Time,
        *,
        capacity: int = 1 << 30,
        processes: int = 1,
        demand: int = 1000,
        refuses: float | None = None,
        client_s: float = 0.0,
        seed: int = 1,
    ) -> None:
        self.time, self.capacity, self.refuses, self.client_s = time, capacity, refuses, client_s
        self.dice = random.Random(seed)
        self.coordinator = Coordinator(LimitSettings())
        share, more = divmod(demand, processes)
        self.clients = [Client(share + (i < more)) for i in range(processes)]
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.busy = 0
        self.queue: deque[Callable[[], None]] = deque()
        self.cpu_free_s = 0.0
        self.in_flight = 0
        self.done: list[float] = []
        self.refusals: list[float] = []
        self.starts: list[float] = []
        self.levels: list[tuple[float, int]] = []
        for i, client in enumerate(self.clients):
            self.at(REPORT_EVERY_S * i / processes, lambda c=client, i=i: self.report(c, str(i)))

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), what))

    def run(self, until: float) -> World:
        while self.events and self.events[0][0] <= until:
            self.now, _, what = heapq.heappop(self.events)
            what()
        self.now = until
        return self

    def report(self, client: Client, name: str) -> None:
        (share,) = self.coordinator.update(name, [client.seen()], self.now)

        def obey() -> None:
            client.limit = client.granted = share.limit
            self.fill(client)

        self.at(self.now + 0.005, obey)
        self.at(self.now + REPORT_EVERY_S, lambda: self.report(client, name))

    def fill(self, client: Client) -> None:
        while client.in_flight < min(client.limit, client.demand) and self.now >= client.paused_s:
            client.in_flight += 1
            client.most = max(client.most, client.in_flight)
            self.in_flight += 1
            self.levels.append((self.now, self.in_flight))
            self.starts.append(self.now)
            began = self.now
            if self.busy < self.capacity:
                self.serve(client, began)
            elif self.refuses is not None:
                self.at(self.now + 0.01, lambda: self.refuse(client))
            else:
                self.queue.append(lambda b=began: self.serve(client, b))

    def serve(self, client: Client, began: float) -> None:
        self.busy += 1
        self.at(self.now + self.time(self.now, self.dice), lambda: self.served(client, began))

    def served(self, client: Client, began: float) -> None:
        self.busy -= 1
        if self.queue and self.busy < self.capacity:
            self.queue.popleft()()
        self.cpu_free_s = max(self.cpu_free_s, self.now) + self.client_s
        self.at(self.cpu_free_s, lambda: self.replied(client, began))

    def left(self, client: Client) -> None:
        client.in_flight -= 1
        self.in_flight -= 1
        self.levels.append((self.now, self.in_flight))
        self.fill(client)

    def replied(self, client: Client, began: float) -> None:
        latency = self.now - began
        client.completed += 1
        client.latency_s += latency
        client.latency_sq += latency * latency
        self.done.append(self.now)
        self.left(client)

    def refuse(self, client: Client) -> None:
        assert self.refuses is not None
        client.refused += 1
        client.asked_s = max(client.asked_s, self.refuses)
        self.refusals.append(self.now)
        if self.refuses:
            client.paused_s = max(client.paused_s, self.now + self.refuses)
            self.at(client.paused_s, lambda: self.fill(client))
        self.left(client)

    def rate(self, since: float, until: float | None = None) -> float:
        """Replies a second."""
        until = self.now if until is None else until
        return sum(since <= t < until for t in self.done) / (until - since)

    def mean_in_flight(self, since: float) -> float:
        """In flight on average over time."""
        late = [(when, level) for when, level in self.levels if when >= since]
        spans = zip(late, [*late[1:], (self.now, 0)], strict=True)
        return sum(level * (after - when) for (when, level), (after, _) in spans) / (self.now - since)

    def most(self, since: float) -> int:
        """The most in flight."""
        return max(level for when, level in self.levels if when >= since)


# --- the control law


@pytest.mark.parametrize("processes", [1, 10])
@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("capacity", [8, 64, 400])
def test_a_server_that_queues_in_silence_is_kept_busy_and_its_queue_short(
    capacity: int, sigma: float, processes: int
) -> None:
    time = lognormal(1.0, sigma) if sigma else fixed(1.0)
    world = World(time, capacity=capacity, processes=processes, demand=4 * capacity + 100).run(120)
    assert world.rate(40) >= 0.95 * capacity
    # A process may always have one request under way, whatever the limit.
    fits = max(capacity, processes)
    # With noisy latencies a moment now and then is above, the run as a whole is not.
    assert world.mean_in_flight(40) <= 1.4 * fits
    assert world.most(40) <= (1.5 if sigma < 0.5 else 1.8) * fits


@pytest.mark.parametrize("processes", [1, 10])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_a_server_that_never_queues_gets_all_there_is_within_a_few_round_trips(
    sigma: float, processes: int
) -> None:
    time = lognormal(1.0, sigma) if sigma else fixed(1.0)
    world = World(time, processes=processes, demand=1000).run(45)
    assert world.rate(10, 12) >= 0.95 * 1000
    assert world.rate(12) >= 0.98 * 1000  # and mere noise takes nothing back


@pytest.mark.parametrize("processes", [1, 10])
def test_a_server_that_refuses_is_asked_for_little_more_than_it_accepts(processes: int) -> None:
    world = World(lognormal(1.0, 0.3), capacity=64, processes=processes, demand=500, refuses=2.0).run(120)
    assert world.rate(20) >= 0.7 * 64
    assert sum(when > 20 for when in world.refusals) <= 0.01 * len(world.done)


@pytest.mark.parametrize("processes", [1, 10])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_replies_that_take_longer_and_longer_are_not_mistaken_for_a_queue(
    sigma: float, processes: int
) -> None:
    """Twice as long after 200 s."""
    noise = lognormal(1.0, sigma)
    world = World(
        lambda now, dice: (1 + now / 200) * noise(now, dice), capacity=64, processes=processes, demand=500
    ).run(240)
    for since in range(40, 240, 40):
        assert world.rate(since, since + 40) >= 0.88 * 64 / (1 + (since + 20) / 200)
    assert world.mean_in_flight(40) <= 1.4 * 64


@pytest.mark.parametrize("processes", [1, 10])
def test_a_client_that_is_slower_than_its_server_does_not_hold_back(processes: int) -> None:
    """2,000 replies a second are all the client can read; the server has no limit."""
    world = World(fixed(0.1), processes=processes, demand=2000, client_s=0.0005).run(25)
    assert world.rate(8) >= 0.95 * 2000


def test_a_client_much_slower_than_its_server_does_not_mistake_itself_for_a_queue() -> None:
    world = World(fixed(0.0002), processes=1, demand=32, client_s=0.0001).run(8)
    assert world.rate(4) >= 0.95 * 10_000


def report(**over: float) -> Seen:
    return Seen("u", "m", **over)  # type: ignore[arg-type]


def test_a_burst_of_refusals_is_one_cut_and_holds_for_as_long_as_was_asked() -> None:
    adaptive = AdaptiveLimit(4096, limit=100)
    adaptive.observe(0.0, report(), 100, 100)
    for i in range(20):
        adaptive.observe(1 + i / 100, report(refused=5, retry_after_s=30.0), 100, 100)
    assert adaptive.limit == 70
    for i in range(116):  # 29 s of quick replies at the limit
        adaptive.observe(2 + i / 4, report(completed=70, latency_s=17.5, latency_sq=4.4), 70, 70)
    assert adaptive.limit == 70
    for i in range(40):
        adaptive.observe(32.5 + i / 4, report(completed=70, latency_s=17.5, latency_sq=4.4), 70, 70)
    assert 72 <= adaptive.limit <= 130  # slowly


def test_faults_of_the_server_cut_nothing_but_stop_growth() -> None:
    adaptive = AdaptiveLimit(4096, limit=16)
    for i in range(40):
        adaptive.observe(i / 4, report(completed=16, latency_s=4.0, latency_sq=1.0, broken=1), 16, 16)
    assert adaptive.limit == 16


def test_without_adaptation_the_static_maximum_is_the_limit() -> None:
    coordinator = Coordinator(LimitSettings(adaptive=False, requests_in_flight=300))
    shares = [s for name in "abc" for s in coordinator.update(name, [report(waiting=500)], 0.0)]
    shares = [s for name in "abc" for s in coordinator.update(name, [report(waiting=500)], 0.25)]
    assert [share.limit for share in shares] == [100, 100, 100]


# --- shares


@given(st.integers(0, 5000), st.lists(st.integers(0, 1000), min_size=1, max_size=30))
def test_parts_add_up(total: int, wanted: list[int]) -> None:
    parts = divide(total, wanted)
    assert sum(parts) == max(total, len(wanted))
    assert min(parts) >= 1
    if total >= 2 * len(wanted):
        by_want = [part for _, part in sorted(zip(wanted, parts, strict=True))]
        assert by_want == sorted(by_want)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), min_size=1, max_size=80))
def test_shares_never_add_up_to_more_than_the_limit(reports: list[tuple[int, int]]) -> None:
    coordinator = Coordinator(LimitSettings(adaptive=False, requests_in_flight=20))
    held: dict[int, int] = {}
    for i, (process, waiting) in enumerate(reports):
        in_flight = min(held.get(process, 0), waiting)
        seen = report(in_flight=in_flight, waiting=waiting - in_flight)
        (share,) = coordinator.update(str(process), [seen], i / 100)
        held[process] = share.limit
        assert share.limit >= 1
        # Those that have not been heard of since one was added to them may have one too many.
        assert sum(held.values()) <= 20 + len(held)


def test_shares_follow_demand() -> None:
    coordinator = Coordinator(LimitSettings(adaptive=False, requests_in_flight=100, requests_per_minute=600))
    for now in (0.0, 0.25, 0.5):
        few = coordinator.update("few", [report(waiting=10)], now)[0]
        many = coordinator.update("many", [report(waiting=90)], now + 0.1)[0]
    assert few.limit + many.limit == 100
    assert 9 <= few.limit <= 12
    assert few.requests_per_minute + many.requests_per_minute == pytest.approx(600)
    assert 50 <= few.requests_per_minute <= 80


def shared_by_nine(coordinator: Coordinator) -> list[int]:
    """What nine agents are given of which four have three dialogues each, then what they are given when the
    others have as many."""
    given: dict[int, int] = {}
    few: list[int] = []
    for round in range(8):
        for i in range(9):
            demand = 3 if i < 4 or round > 5 else 0
            in_flight = min(demand, given.get(i, 0))
            seen = report(in_flight=in_flight, waiting=demand - in_flight, most=in_flight)
            given[i] = coordinator.update(str(i), [seen], round * REPORT_EVERY_S + i / 100)[0].limit
        if round == 5:
            assert all(given[i] == 1 for i in range(4, 9))  # one that gets something need not wait
            few = [given[i] for i in range(4)]
    return [*few, sum(given.values())]


def test_a_process_with_nothing_to_ask_keeps_nothing_from_those_that_have() -> None:
    *few, _ = shared_by_nine(Coordinator(LimitSettings(), {"u": 8}))
    assert few == [2, 2, 2, 2]


def test_the_static_maximum_is_kept_whichever_process_wakes() -> None:
    *few, all_of_them = shared_by_nine(Coordinator(LimitSettings(adaptive=False, requests_in_flight=10)))
    assert sum(few) + 5 <= 10
    assert all_of_them <= 10


def test_what_is_known_of_a_replica_need_not_be_found_out() -> None:
    coordinator = Coordinator(LimitSettings(), {"u": 12})
    for i in range(400):  # replies that take longer and longer, as of a CPU that has more and more at once
        latency_s = 1.0 + i / 10
        seen = report(completed=4, latency_s=4 * latency_s, in_flight=12, most=12, waiting=4)
        [share] = coordinator.update("a", [seen], i * REPORT_EVERY_S)
    assert share.limit == 12
    [other] = Coordinator(LimitSettings(), {"v": 12}).update("a", [report(waiting=50)], 0.0)
    assert other.limit == FIRST_LIMIT
    mine = LimitSettings(adaptive=False, requests_in_flight=100)  # a user's own word
    assert Coordinator(mine, {"u": 12}).update("a", [report(waiting=200)], 0.0)[0].limit == 100
    less = Coordinator(LimitSettings(requests_in_flight=5), {"u": 12})
    assert less.update("a", [report(waiting=200)], 0.0)[0].limit == 5
    assert less.view()[0]["limit"] == 5


def test_a_server_of_our_own_is_not_left_out_for_being_slower_than_another() -> None:
    """One has twelve requests, whose replies come all together, the other one only one."""
    coordinator = Coordinator(LimitSettings(), {"x": 12, "y": 12})
    for i in range(200):
        slow = Seen("x", "m", in_flight=12, most=12)
        if i % 80 == 79:
            slow = Seen("x", "m", completed=12, latency_s=240.0, latency_sq=4800.0, in_flight=12, most=12)
        quick = Seen("y", "m", completed=i % 4 == 0, latency_s=1.0, latency_sq=1.0, in_flight=1, most=1)
        shares = coordinator.update("a", [slow, quick], i * REPORT_EVERY_S)
    assert {share.url: share.weight for share in shares} == {"x": 1.0, "y": 1.0}


def test_a_process_that_falls_silent_loses_its_share() -> None:
    coordinator = Coordinator(LimitSettings(adaptive=False, requests_in_flight=100))
    for now in (0.0, 0.25):
        for name in "ab":
            coordinator.update(name, [report(waiting=50)], now)
    assert coordinator.update("a", [report(waiting=50)], 5.0)[0].limit == 50
    assert coordinator.update("a", [report(waiting=50)], 1.0 + FORGET_S)[0].limit == 100


def test_a_new_coordinator_goes_on_from_what_processes_were_given() -> None:
    coordinator = Coordinator(LimitSettings())
    for name, limit in (("a", 40), ("b", 60)):
        coordinator.update(name, [report(in_flight=limit, limit=limit)], 0.0)
    assert coordinator.view()[0]["limit"] == 100


# --- replicas


def three(coordinator: Coordinator, now: float, **odd: float) -> dict[str, float]:
    """One report of three replicas of which the last is `odd`; their weights."""
    well = {"completed": 20, "latency_s": 20.0, "latency_sq": 20.0, "in_flight": 20, "most": 20}
    seen = [Seen(url, "m", **well) for url in "xy"] + [Seen("z", "m", **odd)]  # type: ignore[arg-type]
    return {share.url: share.weight for share in coordinator.update("p", seen, now)}


@pytest.mark.parametrize(
    "odd",
    [
        {"broken": 20, "in_flight": 5},
        {"completed": 4, "latency_s": 40.0, "latency_sq": 400.0, "in_flight": 20},
        {"in_flight": 20},
    ],
    ids=["broken", "slow", "silent"],
)
def test_a_replica_that_is_not_well_loses_its_share_in_seconds_and_gets_it_back(
    odd: dict[str, float],
) -> None:
    coordinator = Coordinator(LimitSettings())
    usual = {"completed": 20, "latency_s": 20.0, "latency_sq": 20.0, "in_flight": 20}
    assert set(three(coordinator, 0.0, **usual).values()) == {1.0}
    for i in range(1, 20):
        weights = three(coordinator, i * REPORT_EVERY_S, **odd)
    assert weights == {"x": 1.0, "y": 1.0, "z": 0.0}
    trial = {"completed": 1, "latency_s": 1.0, "latency_sq": 1.0}
    climb = [three(coordinator, i * REPORT_EVERY_S, **trial)["z"] for i in range(20, 60)]
    assert climb == sorted(climb)
    assert climb[-1] == 1.0
    assert {0.25, 0.5} < set(climb)


def two(coordinator: Coordinator, now: float, waiting: int) -> dict[str, float]:
    """One report of two servers of one thread, of which one has twelve requests at once, the other one, and
    so answers as often and each of them twelve times as fast; their weights."""
    many = {"completed": 4, "latency_s": 12.0, "latency_sq": 36.0, "in_flight": 12, "most": 12}
    one = {"completed": 4, "latency_s": 1.0, "latency_sq": 0.25, "in_flight": 1, "most": 1}
    seen = [Seen("x", "m", waiting=waiting, **many), Seen("y", "m", waiting=waiting, **one)]
    return {share.url: share.weight for share in coordinator.update("p", seen, now)}


def test_a_replica_that_is_late_for_having_more_at_once_is_not_left_out() -> None:
    """As long as the other one has all that it can do."""
    busy, idle = Coordinator(LimitSettings()), Coordinator(LimitSettings())
    for i in range(40):
        assert two(busy, i * REPORT_EVERY_S, waiting=500) == {"x": 1.0, "y": 1.0}
        weights = two(idle, i * REPORT_EVERY_S, waiting=0)
    assert weights == {"x": 0.0, "y": 1.0}


def test_when_all_replicas_are_broken_none_is_left_out() -> None:
    coordinator = Coordinator(LimitSettings())
    for i in range(8):
        shares = coordinator.update("p", [Seen(url, "m", broken=5) for url in "xyz"], i * REPORT_EVERY_S)
    assert [share.weight for share in shares] == [1.0, 1.0, 1.0]


def test_replicas_together_keep_the_static_maximum() -> None:
    coordinator = Coordinator(LimitSettings(adaptive=False, requests_in_flight=30))
    shares = coordinator.update("p", [Seen(url, "m", waiting=100) for url in "xyz"], 0.0)
    shares = coordinator.update("p", [Seen(url, "m", waiting=100) for url in "xyz"], 0.25)
    assert sum(share.limit for share in shares) == 30
