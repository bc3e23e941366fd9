"""A hostile endpoint over real sockets: each call ends in time, in what it is, and harms no other."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import random
import socket
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from culturepark.messages import FailureKind
from culturepark.models.chat import HttpChatModel
from culturepark.models.embeddings import HttpEmbedder
from culturepark.models.endpoint import HttpEndpoint
from culturepark.models.errors import ModelError
from culturepark.ports import Completion, Embedding, Prompt, Sampling
from culturepark.settings import LimitSettings, ModelSettings
from culturepark.usage import Usage
from tests.hostile import MISDEEDS, RETRY_AFTER, Hostile, framed, full_backlog, good

KEY = "proj.4f9c2a7e11d0b6338855"
DEADLINE_S = 0.3
MOST_BYTES = 64 << 20
KINDS = set(get_args(FailureKind)) - {"internal"}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


class Client:
    """Models on one endpoint, which wait for nothing between attempts."""

    def __init__(self, url: str, sleeps: bool = False, **limits: Any) -> None:
        model = ModelSettings(engine="openai", model="asked-model", base_urls=(url,))
        limit = LimitSettings(**{"retries": 0, "deadline_s": DEADLINE_S, **limits})
        self.waits: list[float] = []

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(seconds if sleeps else 0)

        self._http = HttpEndpoint(model, limit, on_retry=self._retried, sleep=sleep, rng=random.Random(1))
        self._chat = HttpChatModel(model, limit, self._http)
        self._embedder = HttpEmbedder(model, limit, self._http)

    def _retried(self, dialogue: str, url: str, error: ModelError, wait_s: float) -> None:
        self.waits.append(wait_s)

    async def ask(self, dialogue: str, schema: Any = None, text: str = "Say hello.") -> Completion:
        prompt = Prompt().add("user", text)
        return await self._chat.complete(prompt, Sampling(), affinity=dialogue, schema=schema)

    async def end_of(self, dialogue: str) -> Completion | ModelError:
        """How a call ends. Anything that is neither of these two is raised."""
        try:
            return await self.ask(dialogue)
        except ModelError as error:
            return error

    async def embed(self, count: int) -> Embedding | ModelError:
        try:
            return await self._embedder.embed(["text"] * count)
        except ModelError as error:
            return error

    def halt(self) -> None:
        self._http.halt()

    async def close(self) -> None:
        await self._http.close()


@contextmanager
def little_memory() -> Iterator[None]:
    """What is in the block takes less than `MOST_BYTES` at any time."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] - before < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", MISDEEDS)
async def test_each_misdeed_ends_in_time_and_in_what_it_is(name: str) -> None:
    kind = MISDEEDS[name][1]
    async with Hostile().serving() as server:
        client = Client(server.url)
        over = asyncio.Event()

        async def neighbour(number: int) -> int:
            """Asks the same address, time and again; how many answers came."""
            asked = 0
            while not asked or not over.is_set():
                assert (await client.ask(f"well:{number}:{asked}")).text == "Hello."
                asked += 1
                await asyncio.sleep(0.01)
            return asked

        neighbours = [asyncio.create_task(neighbour(i)) for i in range(2)]
        with little_memory():
            began = time.monotonic()
            end = await client.end_of(name)
            took_s = time.monotonic() - began
        over.set()
        answers = await asyncio.gather(*neighbours)
        await client.close()
    assert took_s < 1.2 * DEADLINE_S + 5  # what it may take to read a large body on a busy machine
    assert server.met[name] == 1
    if isinstance(end, Completion):
        assert kind in ("", "*")
    else:
        assert end.kind in KINDS if kind == "*" else end.kind == kind
        assert end.attempts == 1
        said = str(end)
        assert len(said) < 400
        assert said.isprintable()
        assert not any(KEY[at : at + 8] in said for at in range(len(KEY) - 8))
        if kind == "timeout":
            assert took_s > 0.9 * DEADLINE_S
            assert min(answers) > 3  # no other call was held up meanwhile


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
async def test_the_largest_together_take_little_memory() -> None:
    """As the kernel counts it, with what C libraries allocate."""

    def highest_kb() -> int:
        return int(Path("/proc/self/status").read_text("utf-8").split("VmHWM:")[1].split()[0])

    def lowered_kb() -> int:
        try:
            Path("/proc/self/clear_refs").write_text("5", "utf-8")
        except OSError:
            pytest.skip("the high-water mark cannot be set back here")
        return highest_kb()

    large = (
        "10-mb",
        "gzip-bomb",
        "deflate-bomb",
        "endless-gzip",
        "endless-plain",
        "endless-two-byte-crumbs",
        "500-endless",
    )
    async with Hostile().serving() as server:
        client = Client(server.url, deadline_s=5.0, reply_bytes=1 << 20)
        await client.ask("well")
        before_kb = lowered_kb()
        ends = await asyncio.gather(*(client.end_of(f"{name}:{i}") for name in large for i in range(5)))
        assert highest_kb() - before_kb < MOST_BYTES // 1024
        await client.close()
    assert {end.kind for end in ends if isinstance(end, ModelError)} == {"too_large", "server"}


@pytest.mark.parametrize("text", ["Say hello.", "x" * (8 << 20)])
async def test_a_connection_that_is_never_accepted(text: str) -> None:
    """The kernel shakes hands, and no more; a long prompt does not even get out."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        client = Client(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1")
        began = time.monotonic()
        with pytest.raises(ModelError) as caught:
            await client.ask("d", text=text)
        assert caught.value.kind == "timeout"
        assert time.monotonic() - began < 1.2 * DEADLINE_S + 1
        await client.close()


UNSENT = ("connect", "handshake", "refused")
BILLED = {  # how a call may end that the server may have answered, and billed
    **dict.fromkeys(("never", "half-a-head", "half-a-body", "drip-body", "reset", "reset-in-head"), True),
    **dict.fromkeys(("reset-in-body", "cut-length", "cut-gzip", "closed", "10-mb", "gzip-bomb"), True),
    **dict.fromkeys(("endless-plain", "banner", "two-lengths", "length-of-zeros", "brotli", "502"), True),
    **dict.fromkeys(("504", "524", "empty", "surrogate", "300-kb-of-text"), True),
    **dict.fromkeys(("500", "503", "401", "402", "403", "404", "429-soon", "400-format", "redirect"), False),
}


@pytest.mark.parametrize("name", [*BILLED, *UNSENT])
async def test_what_may_have_been_billed_is_never_nothing(name: str) -> None:
    """For a chat call and for an embedding, each with one attempt and with two."""
    async with Hostile().serving() as server, AsyncExitStack() as stack:
        server.rule = lambda met: name
        url = server.url
        if name == "connect":
            url = f"http://127.0.0.1:{stack.enter_context(full_backlog())}/v1"
        elif name == "handshake":
            deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            url = f"https://127.0.0.1:{deaf.getsockname()[1]}/v1"
        elif name == "refused":
            with socket.create_server(("127.0.0.1", 0)) as closed:
                url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        for retries in (0, 1):
            client = Client(url, retries=retries)
            end = await client.end_of("d")
            assert isinstance(end, ModelError)
            embedded = await client.embed(1)
            assert isinstance(embedded, ModelError)
            await client.close()
            for usage, attempts in ((end.usage, end.attempts), (embedded.usage, embedded.attempts)):
                assert usage.calls == (attempts if BILLED.get(name) else 0)
                assert usage.unreported == usage.calls or name == "300-kb-of-text"


async def test_what_failed_attempts_took_is_counted_with_the_reply_that_came() -> None:
    async with Hostile().serving() as server:
        server.turns["d"] = ["never", "503", "reset-in-body", "null-content", "504", "well"]
        client = Client(server.url, retries=9)
        completion = await client.ask("d")
        assert completion.usage.calls == 5  # all but the 503
        assert completion.usage.unreported == 3
        server.turns[""] = ["reset-in-body", "well"]
        server.answer = lambda body: framed(EMBEDDINGS)
        assert (await client.embed(2)).usage == Usage(calls=2, prompt_tokens=5, unreported=1, lost=1)
        await client.close()


async def test_jumps_of_the_clock_change_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.cycle((0.0, 4e9, -1e9, 86_400.0))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    async with Hostile().serving() as server:
        server.turns["d"] = ["503", "never", "429-date", "well"]
        client = Client(server.url, retries=9)
        began = time.monotonic()
        completion = await client.ask("d")
        took_s = time.monotonic() - began
        await client.close()
    assert completion.usage.calls == 2  # the well one, and the one that never came
    assert DEADLINE_S <= took_s < DEADLINE_S + 2
    assert max(client.waits) <= LimitSettings().backoff_max_s


@pytest.mark.parametrize("waits", ["gate", "backoff", "rate"])
async def test_a_halt_ends_calls_that_wait_and_tells_what_was_used(waits: str) -> None:
    async with Hostile().serving() as server:
        misdeeds = {"backoff": ("null-content", "429-billion"), "rate": ("null-content",)}.get(
            waits, ("never",)
        )
        server.rule = lambda met: misdeeds[min(met, len(misdeeds) - 1)]
        rates = {"requests_per_minute": 6} if waits == "rate" else {"requests_in_flight": 1}
        client = Client(server.url, retries=9, sleeps=True, adaptive=False, **rates)
        first = asyncio.create_task(client.end_of("d"))
        second = asyncio.create_task(client.end_of("e")) if waits == "gate" else None
        await asyncio.sleep(0.2)  # below the deadline
        assert server.met.total() == len(misdeeds)
        client.halt()
        end = await asyncio.wait_for(first, 5)
        assert isinstance(end, ModelError)
        assert end.passing
        assert end.usage.calls == 1
        if second is not None:
            other = await asyncio.wait_for(second, 5)
            assert isinstance(other, ModelError)
            assert (other.kind, other.usage) == ("connection", Usage())
        assert isinstance(await client.end_of("f"), ModelError)
        met = server.met.total()
        await client.close()
    assert met == len(misdeeds)


@pytest.mark.parametrize("name", ["stray", "stray-late"])
async def test_a_reply_that_no_request_asked_for_answers_no_later_call(name: str) -> None:
    async with Hostile().serving() as server:
        client = Client(server.url)
        for number in range(5):
            assert (await client.ask(f"{name}:{number}")).text == "Hello."
            await asyncio.sleep(0.04 if name == "stray-late" else 0)  # until it has come
            assert (await client.ask(f"well:{number}")).text == "Hello."
        await client.close()


async def test_a_call_that_is_given_up_keeps_no_connection() -> None:
    async with Hostile().serving() as server:
        client = Client(server.url)
        names = [name for name, (_, kind) in MISDEEDS.items() if kind in ("timeout", "too_large")]
        await asyncio.gather(*(client.end_of(name) for name in names))
        await client.ask("well")
        for _ in range(200):
            await asyncio.sleep(0.01)  # the server learns of it over the wire
            if server.open <= 1:
                break
        assert server.open <= 1
        await client.close()


# --- how often, and how long between


@pytest.mark.parametrize("name", RETRY_AFTER)
async def test_whatever_a_refusal_asks_for_the_wait_is_between_the_limits(name: str) -> None:
    async with Hostile().serving() as server:
        client = Client(server.url, retries=4, backoff_s=0.5, backoff_max_s=20.0)
        end = await client.end_of(f"429-{name}")
        await client.close()
    assert isinstance(end, ModelError)
    assert end.attempts == server.met.total() == 5
    assert len(client.waits) == 4
    most = 20.0 if name in ("far", "billion") else 4.0
    assert all(0.25 * 2**i <= wait <= max(0.5 * 2**i, most) for i, wait in enumerate(client.waits))
    if most == 20.0:
        assert client.waits == [20.0] * 4


QUICK = (
    "well",
    "429-soon",
    "429-billion",
    "500",
    "503",
    "reset",
    "closed",
    "cut-length",
    "empty",
    "null-content",
    "surrogate",
    "banner",
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from(QUICK), min_size=1, max_size=9), st.integers(0, 6), st.booleans(), st.booleans()
)
def test_no_call_makes_more_attempts_than_it_may(
    names: list[str], retries: int, embeds: bool, structured: bool
) -> None:
    async def call() -> None:
        async with Hostile().serving() as server:
            client = Client(server.url, retries=retries, deadline_s=5.0)
            if embeds:
                server.turns[""] = names
                end = await client.embed(1)
            else:
                server.turns["d"] = ["400-format", *names] if structured else names
                try:
                    end = await client.ask("d", schema={"type": "object"} if structured else None)
                except ModelError as error:
                    end = error
            await client.close()
            # That an endpoint refuses a format is learned by one more request.
            attempts = server.met.total() - (structured and not embeds)
            assert 1 <= attempts <= 1 + retries
            assert len(client.waits) <= retries
            assert end.usage.calls <= attempts
            if isinstance(end, ModelError):
                assert end.attempts == attempts

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        asyncio.run(call())


# --- shapes


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in items:
        yield (*path, step)
        yield from _places(inner, (*path, step))


WRONG: tuple[Any, ...] = (
    None, True, 5, -1, 0.5, 10**30, "", "x", [], {}, [[]], [None], {"a": 1}, "\x1b]0;\x07", 1e308,
)  # fmt: skip
EMBEDDINGS = {
    "data": [{"index": 0, "embedding": [3.0, 4.0]}, {"index": 1, "embedding": [0.0, 1.0]}],
    "usage": {"prompt_tokens": 5},
}


@pytest.mark.parametrize("whole", [good(), EMBEDDINGS], ids=["chat", "embeddings"])
async def test_a_wrong_value_in_any_place_is_no_surprise(whole: dict[str, Any]) -> None:
    queue: list[bytes] = []
    for path in _places(whole):
        for value in WRONG:
            odd = copy.deepcopy(whole)
            inner: Any = odd
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = value
            queue.append(framed(odd))
    ends: set[str] = set()
    async with Hostile().serving() as server:
        client = Client(server.url, deadline_s=5.0)
        for odd in queue:
            server.answer = lambda body, odd=odd: odd
            if whole is EMBEDDINGS:
                end = await client.embed(2)
                assert end.usage.calls == 1
                assert 0 <= end.usage.prompt_tokens < 1 << 40
            else:
                end = await client.end_of("d")
                assert end.usage.calls == 1
                assert 0 <= end.usage.cached_tokens <= end.usage.prompt_tokens < 1 << 40
            ends.add(end.kind if isinstance(end, ModelError) else "")
        await client.close()
    expected = {"", "invalid_reply"} if whole is EMBEDDINGS else {"", "invalid_reply", "empty_reply"}
    assert ends == expected


@pytest.mark.parametrize(
    "raw",
    [
        b'{"data": [{"index": 0, "embedding": [' + b",".join([b"0"] * 2_000_000) + b"]}]}",
        b'{"data": [' + b",".join([b'{"index":0,"embedding":[]}'] * 150_000) + b"]}",
        b'{"data": [{"index": 0, "embedding": [1]}], "usage": {"prompt_tokens": ['
        + b",".join([b"[]"] * 1_300_000)
        + b"]}}",
    ],
)
async def test_embeddings_that_swell_when_they_are_read(raw: bytes) -> None:
    async with Hostile().serving() as server:
        client = Client(server.url, deadline_s=10.0)
        server.answer = lambda body: framed(raw)
        with little_memory():
            end = await client.embed(1)
        await client.close()
    assert end.usage == Usage(calls=1, unreported=1)
    assert isinstance(end, ModelError) == (b"prompt_tokens" not in raw)


@pytest.mark.parametrize("seed", range(4))
async def test_bytes_that_make_no_sense(seed: int) -> None:
    """A good response with a few bytes changed, cut out or put in: each call ends as a call may end."""
    dice = random.Random(seed)
    whole = framed(good(), "200 OK", "Content-Encoding: identity", "Retry-After: 3", "Connection: keep-alive")
    tokens = (
        b"\r\n",
        b"\0",
        b"\xff",
        b":",
        b"9999999999",
        b"-1",
        b"chunked",
        b"gzip",
        b"\\ud800",
        b"[[[[",
        b" ",
    )

    def spoilt(body: bytes) -> bytes:
        raw = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(raw))
            end = at + dice.choice((0, 1, 1, 8))
            raw[at:end] = dice.choice((b"", bytes((dice.randrange(256),)), dice.choice(tokens)))
        return bytes(raw)

    async with Hostile().serving() as server:
        client = Client(server.url, deadline_s=0.1, requests_in_flight=50, adaptive=False)
        server.answer, server.once = spoilt, True
        ends = await asyncio.gather(*(client.end_of(f"d{i}") for i in range(150)))
        server.answer, server.once = None, False
        assert {json.dumps((await client.ask(f"well:{i}")).text) for i in range(10)} == {'"Hello."'}
        await client.close()
    kinds = {end.kind if isinstance(end, ModelError) else "" for end in ends}
    assert kinds <= KINDS | {""}
    assert {"", "invalid_reply"} <= kinds
