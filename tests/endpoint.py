"""A real HTTP endpoint whose model is the scripted one: what it says follows from the prompt alone."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from aiohttp import web

from culturepark.models.scripted import ScriptedChat, ScriptedEmbedder
from culturepark.ports import Prompt, Sampling


class Call(msgspec.Struct):
    """A request: what was asked and for which dialogue, and when, by the clock of the wall."""

    key: bytes
    dialogue: str
    began_s: float
    ended_s: float = math.inf


class ScriptedEndpoint:
    """An OpenAI-compatible endpoint on loopback, in a thread; it counts what it is asked.

    With a `key` it refuses (401, counted in `refused`) requests that do not show it. `latency_s` may change
    at any time. `paid` counts requests by what was asked and for which dialogue, `calls` has each of them,
    `tokens` counts what replies reported.
    """

    def __init__(self, key: str = "", latency_s: float = 0.0) -> None:
        self._key = key
        self.latency_s = latency_s
        self.served = self.refused = self.tokens = 0
        self.paid: Counter[bytes] = Counter()
        self.calls: list[Call] = []
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator[ScriptedEndpoint]:
        """Serve until the block ends."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        runner = asyncio.run_coroutine_threadsafe(self._start(), loop).result(30)
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def begin_again(self) -> Counter[bytes]:
        """What was paid so far; counting starts anew."""
        paid, self.paid, self.served = self.paid, Counter(), 0
        self.calls.clear()
        return paid

    def open_between(self, start_s: float, end_s: float) -> Counter[bytes]:
        """The requests that were in flight at some moment of this time, by the clock of the wall."""
        return Counter(c.key for c in self.calls if c.began_s <= end_s and c.ended_s >= start_s)

    async def _start(self) -> web.AppRunner:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/v1/{what:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    async def _answer(self, request: web.Request) -> web.Response:
        if self._key and request.headers.get("Authorization") != f"Bearer {self._key}":
            self.refused += 1
            return web.json_response({"error": {"message": "no such key"}}, status=401)
        self.served += 1
        raw = await request.read()
        body: Any = msgspec.json.decode(raw or b"{}")
        if "input" not in body and "messages" not in body:
            return web.json_response({"data": [{"id": "mock"}]})
        dialogue = request.headers.get("X-Session-ID", "")
        key = hashlib.sha256(dialogue.encode() + raw).digest()[:12]
        self.paid[key] += 1
        call = Call(key, dialogue, time.time())
        self.calls.append(call)
        try:
            await asyncio.sleep(self.latency_s)
            reply = await self._reply(body)
        finally:
            call.ended_s = time.time()
        return web.json_response(reply)

    async def _reply(self, body: Any) -> dict[str, Any]:
        if "input" in body:
            vectors = (await ScriptedEmbedder().embed(body["input"])).vectors
            coded = body.get("encoding_format") == "base64"
            rows = [base64.b64encode(row.tobytes()).decode() if coded else row.tolist() for row in vectors]
            data = [{"index": i, "embedding": row} for i, row in enumerate(rows)]
            self.tokens += 10
            return {"data": data, "model": "mock", "usage": {"prompt_tokens": 10}}
        self.tokens += 20
        prompt = Prompt([msgspec.json.encode(message) for message in body["messages"]])
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
        answer = await ScriptedChat().complete(prompt, Sampling(), affinity="", schema=schema)
        message = {"role": "assistant", "content": answer.text}
        return {
            "model": "mock",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 10},
        }
