"""The model client against a real server that misbehaves: every fault is one ModelError of the right kind."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import gzip
import json
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from aiohttp import web

from culturepark.models.chat import HttpChatModel
from culturepark.models.embeddings import HttpEmbedder
from culturepark.models.endpoint import HttpEndpoint, seconds_of
from culturepark.models.errors import ModelError
from culturepark.ports import Completion, Prompt, Sampling
from culturepark.settings import LimitSettings, ModelSettings
from culturepark.text import tidy
from culturepark.usage import Usage

KEY = "proj.4f9c2a7e11d0b6338855"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def body(content: Any = "Hello.", **over: Any) -> dict[str, Any]:
    """A chat completion."""
    return {
        "model": "served-model",
        "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    } | over


def reply(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Handler:
    """A handler that always says this."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if status == 204:
            return web.Response(status=status)
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        kind = {"Content-Type": "application/json"}
        return web.Response(body=raw, status=status, headers=kind | (headers or {}))

    return handle


class Servers:
    """Servers on loopback, each answering with what comes next in its list, the last one for ever."""

    def __init__(self) -> None:
        self.runners: list[web.AppRunner] = []
        self.requests: list[tuple[int, dict[str, Any], dict[str, str]]] = []
        self.models: list[Any] = []
        self.waits: list[float] = []

    async def start(self, *answers: Any) -> str:
        index, queue = len(self.runners), list(answers)

        async def handle(request: web.Request) -> web.StreamResponse:
            self.requests.append((index, await request.json(), dict(request.headers)))
            answer = queue.pop(0) if len(queue) > 1 else queue[0]
            return await (answer if callable(answer) else reply(answer))(request)

        app = web.Application()
        app.router.add_post("/v1/{rest:.*}", handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.runners.append(runner)
        return f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    def endpoint(
        self, *urls: str, retries: int = 0, **limits: Any
    ) -> tuple[ModelSettings, LimitSettings, HttpEndpoint]:
        model = ModelSettings(engine="openai", model="asked-model", base_urls=urls)
        limit = LimitSettings(retries=retries, **{"deadline_s": 5.0, **limits})

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(0)

        def retried(dialogue: str, url: str, error: ModelError, wait_s: float) -> None:
            self.waits.append(wait_s)

        endpoint = HttpEndpoint(model, limit, on_retry=retried, sleep=sleep, rng=random.Random(1))
        return model, limit, endpoint

    def chat(self, *urls: str, **limits: Any) -> HttpChatModel:
        self.models.append(HttpChatModel(*self.endpoint(*urls, **limits)))
        return self.models[-1]

    def embedder(self, *urls: str, **limits: Any) -> HttpEmbedder:
        self.models.append(HttpEmbedder(*self.endpoint(*urls, **limits)))
        return self.models[-1]

    async def close(self) -> None:
        for model in self.models:
            await model.close()
        for runner in self.runners:
            await runner.cleanup()


@pytest.fixture
async def servers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Servers]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = Servers()
    yield made
    await made.close()


async def ask(model: HttpChatModel, affinity: str = "d1", schema: Any = None) -> Completion:
    return await model.complete(
        Prompt().add("user", "Say hello."), Sampling(), affinity=affinity, schema=schema
    )


async def fails(model: HttpChatModel, schema: Any = None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await ask(model, schema=schema)
    assert KEY not in str(caught.value)
    assert len(caught.value.reason) < 400
    return caught.value


# --- what is sent and read


async def test_a_call_sends_what_the_protocol_says_and_reads_what_it_cost(servers: Servers) -> None:
    completion = await ask(servers.chat(await servers.start(body())))
    assert completion.text == "Hello."
    assert completion.usage == Usage(calls=1, prompt_tokens=9, cached_tokens=4, completion_tokens=3)
    assert (completion.finish_reason, completion.model) == ("stop", "served-model")
    _, sent, headers = servers.requests[0]
    assert sent["messages"] == [{"role": "user", "content": "Say hello."}]
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("asked-model", 168, 0.7)
    assert "cache_prompt" not in sent
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["X-Session-ID"] == "d1"


def _place(*tokens: str) -> dict[str, Any]:
    top = [{"token": token, "logprob": -1.0 - i} for i, token in enumerate(tokens)]
    return {"token": tokens[0], "logprob": -1.0, "top_logprobs": top}


@pytest.mark.parametrize(
    ("logprobs", "content", "first"),
    [
        ({"content": [_place("2", "1")]}, "2", (("2", -1.0), ("1", -2.0))),
        ({"content": [_place("\n", "2"), _place(" 1", "x")]}, "\n 1", ((" 1", -1.0), ("x", -2.0))),
        ({"content": [_place("2")]}, "", (("2", -1.0),)),  # cut before it became a word
        ({"content": None}, "2", ()),
        (None, "2", ()),
        ({"tokens": ["2"], "token_logprobs": [-1.0]}, "2", ()),
        ("odd", "2", ()),
    ],
)
async def test_the_first_words_probabilities(
    servers: Servers, logprobs: Any, content: str, first: Any
) -> None:
    said = {"message": {"content": content}, "finish_reason": "length", "logprobs": logprobs}
    model = servers.chat(await servers.start(body(choices=[said])))
    sampling = Sampling(max_tokens=2, top_logprobs=20)
    completion = await model.complete(Prompt().add("user", "1 or 2?"), sampling, affinity="d1")
    assert completion.first_tokens == first
    sent = servers.requests[0][1]
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 20)


async def test_no_call_pays_for_probabilities_that_were_not_asked_for(servers: Servers) -> None:
    said = {"message": {"content": "2"}, "logprobs": {"content": [_place("2")]}}
    completion = await ask(servers.chat(await servers.start(body(choices=[said]))))
    assert completion.first_tokens == ()
    assert "logprobs" not in servers.requests[0][1]


async def test_the_key_goes_to_no_embedded_server(servers: Servers) -> None:
    url = await servers.start(body())
    model = ModelSettings(engine="embedded", base_urls=(url,))
    servers.models.append(HttpChatModel(model, LimitSettings()))
    await ask(servers.models[-1])
    assert "Authorization" not in servers.requests[0][2]
    assert servers.requests[0][1]["cache_prompt"] is True


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": "many", "completion_tokens": 1},
        {"prompt_tokens": -5, "completion_tokens": 1},
        {"prompt_tokens": 10**30, "completion_tokens": 1},
    ],
)
async def test_odd_counts_make_tokens_unknown_and_cost_no_reply(servers: Servers, usage: Any) -> None:
    completion = await ask(servers.chat(await servers.start(body(usage=usage))))
    assert completion.text == "Hello."
    assert completion.usage == Usage(calls=1, unreported=1)


async def test_more_cached_than_sent_is_not_believed(servers: Servers) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 99}}
    completion = await ask(servers.chat(await servers.start(body(usage=usage))))
    assert completion.usage.cached_tokens == 5


async def test_a_reply_cut_at_its_limit_says_so(servers: Servers) -> None:
    choice = {"message": {"content": "Hel"}, "finish_reason": "length"}
    assert (await ask(servers.chat(await servers.start(body(choices=[choice]))))).finish_reason == "length"


# --- statuses


@pytest.mark.parametrize(
    ("status", "data", "kind", "passing"),
    [
        (401, {"error": {"message": "bad key"}}, "unauthorised", False),
        (402, {"error": {"message": "Insufficient credits"}}, "unauthorised", False),
        (403, {"error": "no"}, "forbidden", False),
        (404, {"error": {"message": "no such model"}}, "no_such_model", False),
        (400, {"error": {"message": "context too long"}}, "bad_request", False),
        (422, {"detail": [{"msg": "field required"}]}, "bad_request", False),
        (301, b"", "bad_request", False),
        (204, b"", "bad_request", False),
        (429, {"error": {"message": "slow down"}}, "rate_limited", True),
        (429, {"error": {"code": "insufficient_quota"}}, "unauthorised", False),
        (408, b"", "server", True),
        (500, b"<html>Internal Server Error</html>", "server", True),
        (503, b"\xff\xfe not text", "server", True),
    ],
)
async def test_statuses(servers: Servers, status: int, data: Any, kind: str, passing: bool) -> None:
    url = await servers.start(reply(data, status))
    error = await fails(servers.chat(url, retries=3))
    assert (error.kind, error.passing, error.status) == (kind, passing, status)
    assert str(status) in error.reason
    assert len(servers.requests) == (4 if passing else 1)
    assert len(servers.waits) == (3 if passing else 0)


async def test_a_passing_fault_passes(servers: Servers) -> None:
    url = await servers.start(reply(b"", 500), reply(b"", 429), body())
    assert (await ask(servers.chat(url, retries=2))).text == "Hello."
    assert len(servers.requests) == 3


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("2.5", 2.5),
        ("999999", 999999.0),
        ("-5", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        (None, None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", None),
        ("Thu, 99 Foo 2020", None),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert seconds_of(header) == seconds


def test_retry_after_as_a_date() -> None:
    assert seconds_of(email.utils.formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)


async def test_waits_grow_heed_retry_after_and_have_a_limit(servers: Servers) -> None:
    headers = [None, None, {"Retry-After": "30"}, {"Retry-After": "86400"}, {"Retry-After": "-1"}]
    url = await servers.start(*(reply(b"", 429, h) for h in headers), body())
    await ask(servers.chat(url, retries=9, backoff_s=1.0, backoff_max_s=40.0))
    first, second, asked, absurd, negative = servers.waits
    assert 0.5 <= first <= 1
    assert 1 <= second <= 2
    assert asked == 30
    assert absurd == 40
    assert 8 <= negative <= 16


# --- bodies that are no replies


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "invalid_reply"),
        (b"{not json", "invalid_reply"),
        (b"[]", "invalid_reply"),
        (b"null", "invalid_reply"),
        (b"\xff\xfe\x00", "invalid_reply"),
        (b'{"choices": [{"message": {"content": "\xff"}}]}', "invalid_reply"),
        (b'{"choices": [{"message": {"content": "a\\ud800b"}}]}', "invalid_reply"),
        (b"[" * 100_000, "invalid_reply"),
        ({"error": {"message": "overloaded"}}, "invalid_reply"),
        ({"choices": "none"}, "invalid_reply"),
        ({"choices": []}, "invalid_reply"),
        ({"choices": [{"message": {"content": 5}}]}, "invalid_reply"),
        ({"choices": [{"message": None}]}, "invalid_reply"),
        (body(None), "empty_reply"),
        (body(" \n"), "empty_reply"),
        (body(choices=[{"message": {"content": "x"}, "finish_reason": "content_filter"}]), "refused"),
        (body(choices=[{"message": {"content": None, "refusal": "I cannot."}}]), "refused"),
    ],
)
async def test_a_body_that_is_no_reply(servers: Servers, data: Any, kind: str) -> None:
    error = await fails(servers.chat(await servers.start(reply(data)), retries=5))
    assert error.kind == kind
    # Each body was paid for, whatever it was good for.
    assert error.usage.calls == len(servers.requests) == (3 if error.passing else 1)


async def test_control_characters_do_no_harm(servers: Servers) -> None:
    data = b'{"choices": [{"message": {"content": "a\\u0000b"}, "finish_reason": "st\\u0000op"}]}'
    completion = await ask(servers.chat(await servers.start(reply(data))))
    assert completion.text == "a\0b"  # the prompt profile cleans it
    assert completion.finish_reason == "stop"


async def test_what_was_spent_on_useless_replies_is_counted(servers: Servers) -> None:
    url = await servers.start(body(None), body(""), body())
    assert (await ask(servers.chat(url, retries=5))).usage == Usage(
        calls=3, prompt_tokens=27, cached_tokens=12, completion_tokens=9
    )
    url = await servers.start(body(None), reply(b"", 400))
    error = await fails(servers.chat(url, retries=5))
    assert error.kind == "bad_request"
    assert error.usage.calls == 1
    assert error.usage.prompt_tokens == 9


# --- connections


async def drip(request: web.Request) -> web.StreamResponse:
    """A byte now and then: a time limit for each read would never be met."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.01)


async def never(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def reset(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def cut_short(request: web.Request) -> web.StreamResponse:
    """Says how long it is and ends before."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"choices": [')
    assert request.transport is not None
    request.transport.close()
    return response


async def cut_unannounced(request: web.Request) -> web.StreamResponse:
    """Says nothing of its length, so that the end of the connection looks like the end of the body."""
    assert request.transport is not None
    request.transport.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"choices": [{"message": {"con')
    request.transport.close()
    return web.Response()


async def no_http(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    request.transport.close()
    return web.Response()


async def bomb(request: web.Request) -> web.StreamResponse:
    """A few kilobytes that become 64 megabytes."""
    return web.Response(body=gzip.compress(bytes(64 << 20), 9), headers={"Content-Encoding": "gzip"})


async def bad_gzip(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"not gzip at all", headers={"Content-Encoding": "gzip"})


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (drip, "timeout"),
        (never, "timeout"),
        (reset, "connection"),
        (cut_short, "connection"),
        (cut_unannounced, "invalid_reply"),
        (no_http, "invalid_reply"),
        (bad_gzip, "connection"),
        (bomb, "too_large"),
        (body("x" * 3000), "too_large"),
    ],
)
async def test_connections_that_fail(servers: Servers, answer: Any, kind: str) -> None:
    url = await servers.start(answer)
    error = await fails(servers.chat(url, deadline_s=0.2 if kind == "timeout" else 5.0, reply_bytes=2048))
    assert error.kind == kind
    assert error.passing


async def test_a_refused_connection(servers: Servers) -> None:
    error = await fails(servers.chat("http://127.0.0.1:9/v1", retries=2))
    assert error.kind == "connection"
    assert len(servers.waits) == 2


@pytest.mark.parametrize("loading", [0, 3])
async def test_an_engine_of_our_own_is_waited_for_while_it_starts_again(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, loading: int
) -> None:
    """A refused connection, or a 503 while the model is loaded, is no attempt."""
    monkeypatch.setattr("culturepark.models.endpoint._RESTART_S", 20.0)
    url = await servers.start(*[reply({"error": {"message": "Loading model"}}, 503)] * loading, body())
    home, port = servers.runners.pop(), int(url.split(":")[2].split("/")[0])
    await home.cleanup()
    told: list[str] = []
    waits = 0

    async def sleep(seconds: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 8:
            await home.setup()
            await web.TCPSite(home, "127.0.0.1", port).start()
            servers.runners.append(home)
        await asyncio.sleep(0)

    model = ModelSettings(engine="embedded", model="small", base_urls=(url, "http://127.0.0.1:9/v1"))
    limits = LimitSettings(retries=0, deadline_s=5.0)
    endpoint = HttpEndpoint(model, limits, on_retry=lambda _, url, *__: told.append(url), sleep=sleep)
    servers.models.append(HttpChatModel(model, limits, endpoint))
    completion = await ask(servers.models[-1])
    assert waits >= 8
    assert len(told) == 1
    assert completion.usage.calls == 1


async def test_an_engine_of_our_own_that_stays_away_is_not_waited_for_for_ever(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("culturepark.models.endpoint._RESTART_S", 0.1)
    model = ModelSettings(engine="embedded", model="small", base_urls=("http://127.0.0.1:9/v1",))
    limits = LimitSettings(retries=1, deadline_s=5.0, backoff_s=0.01)
    servers.models.append(HttpChatModel(model, limits))
    error = await fails(servers.models[-1])
    assert error.kind == "connection"
    assert error.usage.calls == 0


async def test_no_more_requests_at_once_than_allowed(servers: Servers) -> None:
    now, most = 0, 0

    async def slow(request: web.Request) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return await reply(body())(request)

    model = servers.chat(await servers.start(slow), requests_in_flight=3)
    await asyncio.gather(*(ask(model, f"d{i}") for i in range(12)))
    assert most == 3


# --- the key


@pytest.mark.parametrize(
    "data",
    [
        {"error": {"message": f"Incorrect API key provided: {KEY}."}},
        {"error": {"message": ("x" * 380) + KEY * 20}},
        {"error": {"message": KEY * 40}},
        {"error": {"message": KEY[:9] + "\u200b" + KEY[9:]}},
        {"error": f"Authorization: Bearer {KEY}"},
        KEY.encode(),
        b"\xff" + KEY.encode(),
    ],
)
@pytest.mark.parametrize("status", [401, 400, 500])
async def test_a_key_that_is_echoed_is_not_shown(servers: Servers, data: Any, status: int) -> None:
    error = await fails(servers.chat(await servers.start(reply(data, status))))
    for start in range(3, len(KEY) - 8):
        assert KEY[start : start + 8] not in str(error)


async def test_a_key_in_a_reply_does_not_reach_errors_and_provenance(servers: Servers) -> None:
    refusal = {"message": {"content": None, "refusal": f"You sent {KEY}"}}
    await fails(servers.chat(await servers.start(body(choices=[refusal]))))
    await fails(servers.chat(await servers.start(body("", choices=[{"message": {}, "finish_reason": KEY}]))))
    named = await ask(servers.chat(await servers.start(body(model=f"m {KEY}"))))
    assert KEY not in named.model


@pytest.mark.parametrize("echo", [KEY, KEY[:9] + "\u200b" + KEY[9:], f"{KEY[:5]}<|im_end|>{KEY[5:]}"])
async def test_a_key_that_a_model_says_is_not_passed_on(servers: Servers, echo: str) -> None:
    said = (await ask(servers.chat(await servers.start(body(f"Your key is {echo}, is it not?"))))).text
    assert said == "Your key is [key], is it not?"
    assert KEY not in tidy(said)


async def test_a_dummy_key_may_be_said(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    said = await ask(servers.chat(await servers.start(body("There is none."))))
    assert said.text == "There is none."


# --- replicas


async def test_a_dialogue_stays_on_its_replica_and_dialogues_spread(servers: Servers) -> None:
    model = servers.chat(await servers.start(body()), await servers.start(body()))
    seen: dict[str, set[int]] = {}
    for i in range(40):
        dialogue = f"d{i % 20}"
        await ask(model, dialogue)
        seen.setdefault(dialogue, set()).add(servers.requests[-1][0])
    assert all(len(replicas) == 1 for replicas in seen.values())
    assert {next(iter(replicas)) for replicas in seen.values()} == {0, 1}


@pytest.mark.parametrize("fault", [reply(b"", 503), b"", reset])
async def test_the_next_replica_is_tried_after_a_fault(servers: Servers, fault: Any) -> None:
    broken, whole = (
        await servers.start(reply(fault) if isinstance(fault, bytes) else fault),
        await servers.start(body()),
    )
    model = servers.chat(broken, whole, retries=1)
    for i in range(30):  # of ten, once in a thousand times all would go to the same one
        assert (await ask(model, f"d{i}")).text == "Hello."
    assert {index for index, _, _ in servers.requests} == {0, 1}


# --- structured output

SCHEMA = {"type": "object"}


async def test_an_endpoint_without_structured_output_is_asked_for_it_once(servers: Servers) -> None:
    refuses = reply({"error": {"message": "response_format is not supported"}}, 400)
    model = servers.chat(await servers.start(refuses, body()))
    for _ in range(3):
        assert (await ask(model, schema=SCHEMA)).text == "Hello."
    assert ["response_format" in sent for _, sent, _ in servers.requests] == [True, False, False, False]


async def test_another_refusal_is_no_reason_to_ask_for_less(servers: Servers) -> None:
    model = servers.chat(await servers.start(reply({"error": {"message": "too long"}}, 400)))
    assert (await fails(model, SCHEMA)).kind == "bad_request"
    assert len(servers.requests) == 1


async def test_the_schema_is_sent_only_where_settings_say_it_is_obeyed(servers: Servers) -> None:
    url = await servers.start(body())
    settings, limits, endpoint = servers.endpoint(url)
    model = HttpChatModel(msgspec.structs.replace(settings, structured=False), limits, endpoint)
    servers.models.append(model)
    await ask(model, schema=SCHEMA)
    await ask(servers.chat(url), schema=SCHEMA)
    assert ["response_format" in sent for _, sent, _ in servers.requests] == [False, True]


# --- embeddings


def rows(*vectors: Any) -> dict[str, Any]:
    return {"data": [{"embedding": v, "index": i} for i, v in enumerate(vectors)]}


async def test_embeddings_come_in_order_and_of_length_one(servers: Servers) -> None:
    mixed = {"data": [{"embedding": [0.0, 2.0], "index": 1}, {"embedding": [3.0, 0.0], "index": 0}]}
    vectors = (await servers.embedder(await servers.start(mixed)).embed(["a", "b"])).vectors
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def as_base64(*numbers: float) -> str:
    return base64.b64encode(np.array(numbers, "<f4").tobytes()).decode()


async def test_embeddings_are_asked_for_in_base64_and_read_in_either_form(servers: Servers) -> None:
    both = {"data": [{"embedding": as_base64(0.0, 2.0), "index": 1}, {"embedding": [3.0, 0.0], "index": 0}]}
    vectors = (await servers.embedder(await servers.start(both)).embed(["a", "b"])).vectors
    assert vectors.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert servers.requests[0][1]["encoding_format"] == "base64"


def float64(of: Any) -> str:
    """Numbers of this kind, a zero among them, with 64 bits each."""
    numbers = np.linspace(-0.4, 0.7, 64, dtype=of)
    numbers[5] = 0
    return base64.b64encode(numbers.astype("<f8").tobytes()).decode()


@pytest.mark.parametrize(
    ("refusal", "calls"),
    [
        (reply({"error": {"message": "encoding_format 'base64' is not supported"}}, 400), 1),
        (reply({"detail": "base64 encoding is not currently supported"}, 400), 1),
        (reply({"data": []}), 2),  # an answer that is of no use may have been billed
        *((reply(rows(float64(kind))), 2) for kind in (np.float16, np.float32, np.float64)),
    ],
)
async def test_an_endpoint_without_base64_is_asked_for_numbers_from_then_on(
    servers: Servers, refusal: Handler, calls: int
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        in_base64 = (await request.json())["encoding_format"] == "base64"
        return await (refusal if in_base64 else reply(rows([1.0, 0.0])))(request)

    embedder = servers.embedder(await servers.start(answer), retries=1)
    # Several at once find it out, each for itself.
    for embedding in await asyncio.gather(*(embedder.embed(["a"]) for _ in range(3))):
        assert embedding.vectors.tolist() == [[1.0, 0.0]]
        assert embedding.usage.calls == calls
    assert sorted(forms(servers)) == ["base64"] * 3 + ["float"] * 3
    assert (await embedder.embed(["a"])).vectors.tolist() == [[1.0, 0.0]]
    assert forms(servers)[6:] == ["float"]


def forms(servers: Servers) -> list[str]:
    return [sent["encoding_format"] for _, sent, _ in servers.requests]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_an_endpoint_that_is_down_or_busy_is_not_asked_once_more_in_numbers(
    servers: Servers, status: int
) -> None:
    embedder = servers.embedder(await servers.start(reply({"error": "later"}, status)), retries=1)
    with pytest.raises(ModelError, match=str(status)):
        await embedder.embed(["a"])
    assert forms(servers) == ["base64", "base64"]


async def test_an_endpoint_that_answered_in_base64_is_asked_otherwise_only_if_it_says_so(
    servers: Servers,
) -> None:
    coded = reply({"data": [{"embedding": as_base64(1.0, 0.0), "index": 0}]})
    too_long = reply({"error": "for more information see the limits"}, 400)
    other = reply({"error": "encoding_format is not supported"}, 400)  # of another replica
    embedder = servers.embedder(await servers.start(coded, reply({}, 500), too_long, other, rows([1.0, 0.0])))
    await embedder.embed(["a"])
    for said in ("HTTP 500", "HTTP 400"):
        with pytest.raises(ModelError, match=said):
            await embedder.embed(["a"])
    for _ in range(2):
        assert (await embedder.embed(["a"])).vectors.tolist() == [[1.0, 0.0]]
    assert forms(servers) == ["base64"] * 4 + ["float"] * 2


async def test_an_endpoint_that_sends_numbers_all_the_same_is_asked_as_before(servers: Servers) -> None:
    """What an endpoint is asked does not depend on what this process has asked it before."""
    embedder = servers.embedder(await servers.start(reply(rows([1.0, 0.0]))))
    for _ in range(2):
        assert (await embedder.embed(["a"])).vectors.tolist() == [[1.0, 0.0]]
    assert forms(servers) == ["base64"] * 2


async def test_many_texts_go_in_batches(servers: Servers) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        texts = (await request.json())["input"]
        return await reply(rows(*([float(text), 1.0] for text in texts)))(request)

    many = [str(i) for i in range(130)]
    vectors = (await servers.embedder(await servers.start(echo)).embed(many)).vectors
    assert [len(sent["input"]) for _, sent, _ in servers.requests] == [64, 64, 2]
    assert np.argsort(vectors[:, 0]).tolist() == list(range(130))
    servers.requests.clear()
    long = [f"{i}{' ' * 30_000}" for i in range(5)] + ["5" + " " * 100_000, "6"]
    vectors = (await servers.embedder(await servers.start(echo)).embed(long)).vectors
    assert [len(sent["input"]) for _, sent, _ in servers.requests] == [2, 2, 1, 1, 1]
    assert np.argsort(vectors[:, 0]).tolist() == list(range(7))
    assert (await servers.embedder(await servers.start(echo)).embed([])).vectors.shape[0] == 0


async def test_a_failed_batch_has_cost_what_those_before_it_did(servers: Servers) -> None:
    first = rows(*([float(i), 1.0] for i in range(64))) | {"usage": {"prompt_tokens": 70}}
    embedder = servers.embedder(await servers.start(first, reply({"error": "no such text"}, 400)))
    with pytest.raises(ModelError) as caught:
        await embedder.embed([str(i) for i in range(65)])
    assert caught.value.usage == Usage(calls=1, prompt_tokens=70)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        {"data": []},
        rows([1.0, 2.0]),
        rows([1.0], [1.0, 2.0]),
        rows([], []),
        {"data": [{"embedding": [1.0], "index": 0}] * 2},
        {"data": [{"embedding": ["a"], "index": 0}, {"embedding": [1.0], "index": 1}]},
        b'{"data": [{"embedding": [1e999], "index": 0}, {"embedding": [1.0], "index": 1}]}',
        *(
            {"data": [{"embedding": odd, "index": 0}, {"embedding": as_base64(1.0), "index": 1}]}
            for odd in ("AAA", "not base64!", "AAAAAAA=", "", as_base64(math.nan), as_base64(1.0, 2.0))
        ),
        {"error": {"message": KEY}},
    ],
)
async def test_what_is_no_list_of_embeddings(servers: Servers, data: Any) -> None:
    embedder = servers.embedder(await servers.start(reply(data)), retries=1)
    with pytest.raises(ModelError) as caught:
        await embedder.embed(["a", "b"])
    assert caught.value.kind == "invalid_reply"
    assert KEY not in str(caught.value)
    assert len(servers.requests) == 2
    good = servers.embedder(await servers.start(reply(data), rows([1.0, 0.0], [0.0, 1.0])), retries=1)
    assert (await good.embed(["a", "b"])).vectors.shape == (2, 2)


async def test_vectors_of_another_length_are_another_models(servers: Servers) -> None:
    embedder = servers.embedder(await servers.start(rows([1.0, 0.0]), rows([1.0, 0.0, 0.0])))
    await embedder.embed(["a"])
    with pytest.raises(ModelError, match="3 dimensions"):
        await embedder.embed(["b"])
