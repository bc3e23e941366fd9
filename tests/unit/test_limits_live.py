"""Gates under any order of events, and the whole client against real servers on loopback."""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from culturepark.limits.gates import Gate, Pacer
from culturepark.messages import Share
from culturepark.models.endpoint import HttpEndpoint
from culturepark.models.errors import ModelError
from culturepark.settings import LimitSettings, ModelSettings

# --- gates

steps = st.lists(
    st.one_of(
        st.just(("enter", 0)),
        st.tuples(st.sampled_from(["leave", "cancel", "limit", "hold"]), st.integers(0, 6)),
        st.sampled_from([("pause", 0), ("resume", 0), ("reject_waiting", 0), ("breathe", 0)]),
    ),
    max_size=60,
)


@given(steps)
def test_a_gate_keeps_its_limit_forgets_no_request_and_loses_no_room(script: list[tuple[str, int]]) -> None:
    asyncio.run(follow(script))


async def follow(script: list[tuple[str, int]]) -> None:
    gate = Gate(2)
    inside: list[int] = []
    admitted: list[int] = []
    leaving: dict[int, asyncio.Event] = {}
    tasks: dict[int, asyncio.Task[None]] = {}

    async def visit(number: int) -> None:
        if not await gate.enter():
            return
        inside.append(number)
        admitted.append(number)
        try:
            await leaving[number].wait()
        finally:
            inside.remove(number)
            gate.leave()

    async def breathe() -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    for what, value in script:
        before = gate.in_flight
        if what == "enter":
            number = len(tasks)
            leaving[number] = asyncio.Event()
            tasks[number] = asyncio.create_task(visit(number))
        elif what == "leave" and inside:
            leaving[inside[value % len(inside)]].set()
        elif what == "cancel" and tasks:
            tasks[value % len(tasks)].cancel()
        elif what == "limit":
            gate.set_limit(value + 1)
        elif what in ("pause", "resume", "reject_waiting"):
            getattr(gate, what)()
        elif what == "hold":
            gate.hold(bool(value % 2))
        elif what == "breathe":
            await breathe()
        assert gate.in_flight <= max(before, gate.limit)
        assert not (gate.held and gate.free)
        assert not gate.held or gate.in_flight <= before
    gate.resume()
    gate.hold(False)
    await breathe()
    assert gate.in_flight == len(inside)
    waiting = [n for n, task in tasks.items() if not task.done() and n not in inside]
    assert gate.waiting == len(waiting)
    assert not waiting or gate.in_flight >= gate.limit
    gate.set_limit(1000)
    await breathe()
    assert not gate.waiting
    assert [n for n in admitted if n in waiting] == waiting  # first come, first served
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert gate.in_flight == 0


async def test_a_pacer_keeps_a_rate_and_settles_what_replies_cost() -> None:
    now = [0.0]
    requests = Pacer(600, 0, clock=lambda: now[0])
    waiting = [asyncio.ensure_future(requests.acquire()) for _ in range(100)]
    passed: list[int] = []
    for tick in range(50):
        now[0] = tick / 10
        requests.set_rates(600, 0)
        await asyncio.sleep(0)
        passed.append(sum(task.done() for task in waiting))
    assert passed[0] == 10  # a second's worth at once
    assert passed[-1] == 10 + 49
    waiting[60].cancel()
    tokens = Pacer(0, 6000, clock=lambda: now[0])
    await tokens.acquire()
    tokens.spent(500)  # five seconds' worth
    late = asyncio.ensure_future(tokens.acquire())
    for after, done in ((3.5, False), (4.5, True)):
        now[0] = 4.9 + after
        tokens.set_rates(0, 6000)
        await asyncio.sleep(0)
        assert late.done() == done
    for task in waiting:
        task.cancel()


# --- servers


class Server:
    """Answers after `time_s`, working on `capacity` requests at once and letting the others wait."""

    def __init__(self, time_s: float, capacity: int = 10_000) -> None:
        self.time_s = time_s
        self.slots = asyncio.Semaphore(capacity)
        self.in_flight = 0
        self.accepted: list[tuple[float, int]] = []
        self.done: list[float] = []
        self.worked_s = 0.0
        self.status = 200
        self._runner: web.ServerRunner | None = None
        self.port = 0

    async def start(self) -> Server:
        self._runner = web.ServerRunner(web.Server(self.handle), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        self.in_flight += 1
        self.accepted.append((time.monotonic(), self.in_flight))
        try:
            async with self.slots:
                began = time.monotonic()
                await asyncio.sleep(self.time_s)
                self.done.append(time.monotonic())
                self.worked_s += self.done[-1] - began
            return web.Response(body=b"{}", status=self.status)
        finally:
            self.in_flight -= 1

    def rate(self, since: float, until: float) -> float:
        """Requests accepted a second."""
        return sum(since <= t < until for t, _ in self.accepted) / (until - since)

    def share(self, others: list[Server], since: float, until: float) -> float:
        """This server's part of the requests that came in between."""
        rates = [one.rate(since, until) for one in (self, *others)]
        return rates[0] / max(1, sum(rates))


def client(*servers: Server, **limits: Any) -> HttpEndpoint:
    model = ModelSettings(engine="openai", model="m", base_urls=tuple(server.url for server in servers))
    return HttpEndpoint(model, LimitSettings(**limits))


async def load(endpoint: HttpEndpoint, dialogues: int, until: float) -> int:
    """Dialogues that call again as soon as they have their reply; returns how many calls failed."""
    failures = 0

    async def talk(number: int) -> None:
        nonlocal failures
        while time.monotonic() < until:
            try:
                await endpoint.post("/x", b"{}", affinity=f"d{number}")
            except ModelError:
                failures += 1

    await asyncio.gather(*(talk(i) for i in range(dialogues)))
    return failures


async def test_near_the_best_limit_of_a_server_that_queues_in_silence() -> None:
    """On real connections; how near exactly is for the simulation in test_limits.py, which no other load
    disturbs."""
    server = await Server(0.1, capacity=24).start()
    endpoint = client(server)
    began = time.monotonic()
    try:
        await load(endpoint, 200, began + 8)
    finally:
        await endpoint.close()
        await server.stop()
    since, until = began + 3, began + 8
    best = 24 * len(server.done) / server.worked_s
    assert sum(since <= t < until for t in server.done) / (until - since) >= 0.85 * best
    levels = [level for t, level in server.accepted if since <= t < until]
    assert sum(levels) / len(levels) <= 1.6 * 24  # without a limit it would be 200


async def test_a_replica_that_dies_loses_its_load_and_gets_it_back() -> None:
    # So slow that the machine is not what limits it.
    well, other = await Server(0.15).start(), await Server(0.15).start()
    endpoint = client(well, other, backoff_s=0.05)
    began = time.monotonic()

    async def fate() -> None:
        await asyncio.sleep(1.5)
        await other.stop()
        await asyncio.sleep(2)
        await other.start()

    try:
        fates = asyncio.create_task(fate())
        failures = await load(endpoint, 40, began + 13)
        await fates
    finally:
        await endpoint.close()
        await well.stop()
        await other.stop()
    assert failures == 0
    assert 0.25 <= other.share([well], began + 0.5, began + 1.5) <= 0.75
    assert other.share([well], began + 2.5, began + 3.5) == 0
    assert 0.25 <= other.share([well], began + 12, began + 13) <= 0.75
    # While it was dead, the load went on at the other.
    rates = [well.rate(began + 2.5, began + 3.5), well.rate(began + 12, began + 13)]
    assert rates[0] >= 1.3 * rates[1]


async def test_a_replica_that_fails_is_given_trials_only_at_once() -> None:
    well, broken = await Server(0.02).start(), await Server(0.0).start()
    broken.status = 503
    endpoint = client(well, broken)
    began = time.monotonic()
    try:
        assert await load(endpoint, 20, began + 2) == 0
    finally:
        await endpoint.close()
        await well.stop()
        await broken.stop()
    # The first burst, then one trial each half second.
    assert len(broken.accepted) <= 20 + 8
    assert broken.share([well], began + 0.5, began + 2) <= 0.05


async def test_waiting_requests_go_to_a_replica_that_is_back() -> None:
    """Not only later ones: an evaluation asks all its questions at once."""
    well, back = await Server(0.02).start(), await Server(0.02).start()
    endpoint = client(well, back)
    endpoint.replicas.obey([Share(well.url, "m", 1), Share(back.url, "m", 1, weight=0.0)])
    calls = [asyncio.create_task(endpoint.post("/x", b"{}", affinity=f"d{i}")) for i in range(100)]
    try:
        await asyncio.wait(calls, timeout=0.2)
        before = len(well.done)
        endpoint.replicas.obey([Share(well.url, "m", 1), Share(back.url, "m", 1)])
        await asyncio.gather(*calls)
    finally:
        await endpoint.close()
        await well.stop()
        await back.stop()
    assert len(well.done) + len(back.done) == 100
    assert len(back.done) >= (100 - before) / 4


async def test_retry_after_stops_one_replica_at_once() -> None:
    server = await Server(0.01).start()
    endpoint = client(server, retries=1)
    refusals, refused = [0.0], asyncio.Event()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        server.accepted.append((time.monotonic(), 1))
        if len(refusals) == 1:
            refusals.append(time.monotonic())
            refused.set()
            return web.Response(status=429, headers={"Retry-After": "1"})
        return web.Response(body=b"{}")

    server.handle = handle  # type: ignore[method-assign]
    await server.stop()
    await server.start()
    try:
        await endpoint.post("/x", b"{}")
        assert time.monotonic() - refusals[1] >= 1.0
        refusals.pop()
        refused.clear()
        first = asyncio.create_task(endpoint.post("/x", b"{}"))
        await refused.wait()
        await asyncio.sleep(0.05)
        await endpoint.post("/x", b"{}")  # another call, which was refused nothing itself
        assert time.monotonic() - refusals[1] >= 1.0
        await first
    finally:
        await endpoint.close()
        await server.stop()


async def test_no_more_connections_are_opened_than_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    server = await Server(0.05).start()
    endpoint = client(server, requests_in_flight=1000, adaptive=False)
    try:
        assert await load(endpoint, 200, time.monotonic() + 0.3) == 0
        assert max(in_flight for _, in_flight in server.accepted) == 32
        endpoint.replicas.obey([Share(endpoint.replicas.urls[0], "m", 1000)])  # whatever a coordinator says
        assert endpoint.replicas.by_url[endpoint.replicas.urls[0]].gate.limit == 32
    finally:
        await endpoint.close()
        await server.stop()
