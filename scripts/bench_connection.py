"""Our own HTTP/1.1 connection against aiohttp's client: CPU a call, calls/s, and their ratio.

    python scripts/bench_connection.py
    python scripts/bench_connection.py --calls 500 --rounds 1 --json FILE

All subjects work in turn in one process, in alternating order, against `mock_endpoint.py` in a process of its
own whose CPU does not count. A call is a POST of a chat body of 3.4 KB (a history of 14 turns), whose
reply is decoded by msgspec. Each round opens its connections before it is measured. CPU is what is compared:
calls/s may be limited by the mock.

  pool              `ConnectionPool.post`, the connection of a run's model calls
  aiohttp-deadline  `ClientSession.post` without a limit of connections, `raise_for_status`, `read`, all of it
                    within `asyncio.timeout`
  aiohttp           the same without a deadline

What `pool` does and the others do not: it caps the bytes of a reply after decompression, caps and shortens
the wait for the body of an error, and says whether a failed call was sent at all, on which retries and
routing depend. What aiohttp does and `pool` does not: redirects, proxies, cookies (off here), charsets.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp
import msgspec
from bench_subjects import Reply
from measuring import mock_endpoint

from culturepark.models.connection import Address, ConnectionPool

TURNS = 14
IN_FLIGHT = (64, 512)
DEADLINE_S = 120.0
"""Seconds until a call fails, as in a run; no call comes near it."""
MAX_BYTES = 8 << 20
HEADERS = {"Authorization": "Bearer none"}

Post = Callable[[bytes], Awaitable[bytes]]


def chat_body() -> bytes:
    """A chat request with a history of TURNS turns, 3.4 KB."""
    words = "In my childhood my mother always said that elders are to be heard first, for peace. "
    messages = [{"role": "system", "content": 5 * words}]
    for turn in range(TURNS):
        role = "user" if turn % 2 == 0 else "assistant"
        messages.append({"role": role, "content": f"{turn}: {2 * words}"})
    request = {"messages": messages, "model": "mock", "temperature": 0.7, "max_tokens": 168}
    return msgspec.json.encode(request)


@asynccontextmanager
async def pool_client(url: str) -> AsyncGenerator[Post]:
    """Our own connections."""
    pool, address = ConnectionPool(MAX_BYTES, DEADLINE_S), Address.of(url, HEADERS)

    async def post(body: bytes) -> bytes:
        response = await pool.post(address, body)
        if response.status >= 400:
            raise RuntimeError(f"status {response.status}")
        return response.body

    try:
        yield post
    finally:
        await pool.close()


@asynccontextmanager
async def aiohttp_client(url: str, deadline_s: float | None) -> AsyncGenerator[Post]:
    """aiohttp, with its own timers off: the deadline is asyncio's."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        headers={**HEADERS, "Content-Type": "application/json"},
    )

    async def post(body: bytes) -> bytes:
        async with session.post(url, data=body) as response:
            response.raise_for_status()
            return await response.read()

    async def post_in_time(body: bytes) -> bytes:
        async with asyncio.timeout(deadline_s):
            return await post(body)

    async with session:
        yield post_in_time if deadline_s else post


CLIENTS = {
    "pool": pool_client,
    "aiohttp-deadline": partial(aiohttp_client, deadline_s=DEADLINE_S),
    "aiohttp": partial(aiohttp_client, deadline_s=None),
}


async def measured_round(subject: str, url: str, calls: int, in_flight: int) -> dict[str, float]:
    """CPU ms a call (user and system) and calls/s of one round."""
    body, reply = chat_body(), msgspec.json.Decoder(Reply)
    async with CLIENTS[subject](url) as post:

        async def call_all(count: int) -> None:
            numbers = iter(range(count))

            async def work() -> None:
                for _ in numbers:
                    if not reply.decode(await post(body)).choices[0].message.content:
                        raise RuntimeError("an empty reply")

            await asyncio.gather(*(work() for _ in range(in_flight)))

        await call_all(2 * in_flight)  # opens the connections
        gc.collect()
        before, started_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        await call_all(calls)
        wall_s, after = time.perf_counter() - started_s, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_ms_per_call": 1000 * cpu_s / calls, "calls_per_s": calls / wall_s}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=20_000, help="calls of one subject in a round (20000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each subject (5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    given = parser.parse_args()
    print(f"body {len(chat_body()):,} bytes, {given.calls:,} calls a round, {given.rounds} rounds")
    report: dict[str, Any] = {}
    for in_flight in IN_FLIGHT:
        found: dict[str, list[dict[str, float]]] = {subject: [] for subject in CLIENTS}
        with mock_endpoint() as mock:
            url = f"{mock.url}/v1/chat/completions"
            for number in range(given.rounds):
                for subject in (*CLIENTS,)[:: 1 if number % 2 == 0 else -1]:
                    found[subject].append(asyncio.run(measured_round(subject, url, given.calls, in_flight)))
        report[str(in_flight)] = found
        print(f"{in_flight} in flight")
        for subject, rounds in found.items():
            cpu, rate = ([one[key] for one in rounds] for key in ("cpu_ms_per_call", "calls_per_s"))
            ratio = statistics.median(
                own["cpu_ms_per_call"] / one["cpu_ms_per_call"]
                for own, one in zip(rounds, found["pool"], strict=True)
            )
            print(
                f"  {subject:<17} {statistics.median(cpu):.4f} CPU ms a call "
                f"({min(cpu):.4f} - {max(cpu):.4f}), {statistics.median(rate):,.0f} calls/s, "
                f"{ratio:.2f} times the CPU of pool"
            )
    if given.json:
        given.json.write_text(json.dumps(report, indent=1), "utf-8")


if __name__ == "__main__":
    main()
