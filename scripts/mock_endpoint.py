"""A mock OpenAI-compatible endpoint on loopback, for tests and benchmarks: no model behind it.

    python scripts/mock_endpoint.py --port 8000 --latency-s 0.5

It answers the project's prompts by rule (culturepark.models.scripted). GET /stats tells how many
requests it has answered and the most it had at once.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
from aiohttp import web

from culturepark.models.scripted import ScriptedChat, ScriptedEmbedder
from culturepark.ports import Prompt, Sampling


class MockEndpoint:
    """Answers chats and embeddings, counting them."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._chat = ScriptedChat()
        self._embedder = ScriptedEmbedder()
        self._now = 0
        self.stats = {"chats": 0, "embeddings": 0, "most_at_once": 0}

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chats)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_get("/stats", self._stats)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [{"id": "mock", "object": "model"}]})

    async def _chats(self, request: web.Request) -> web.Response:
        self._now += 1
        self.stats["most_at_once"] = max(self.stats["most_at_once"], self._now)
        try:
            body: Any = msgspec.json.decode(await request.read())
            prompt = Prompt([msgspec.json.encode(message) for message in body["messages"]])
            schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
            if self._latency_s:
                await asyncio.sleep(self._latency_s)
            answer = await self._chat.complete(prompt, Sampling(), affinity="", schema=schema)
        finally:
            self._now -= 1
        self.stats["chats"] += 1
        message = {"role": "assistant", "content": answer.text}
        usage = {
            "prompt_tokens": answer.usage.prompt_tokens,
            "completion_tokens": answer.usage.completion_tokens,
        }
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return _json({"id": "mock", "model": "mock", "choices": [choice], "usage": usage})

    async def _embeddings(self, request: web.Request) -> web.Response:
        body: Any = msgspec.json.decode(await request.read())
        vectors = await self._embedder.embed(body["input"])
        self.stats["embeddings"] += 1
        data = [{"index": i, "embedding": vector.tolist()} for i, vector in enumerate(vectors)]
        return _json({"object": "list", "model": "mock", "data": data})

    async def _stats(self, request: web.Request) -> web.Response:
        return _json(self.stats)


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--latency-s", type=float, default=0.0)
    given = parser.parse_args()
    endpoint = MockEndpoint(given.latency_s)
    web.run_app(endpoint.app(), host="127.0.0.1", port=given.port, access_log=None, print=None)


if __name__ == "__main__":
    main()
