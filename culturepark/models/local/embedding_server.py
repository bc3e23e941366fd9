"""The embedder of this machine behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from culturepark.models.local.e5 import packaged_e5
from culturepark.models.local.engine import LOOPBACK
from culturepark.models.local.weights import EMBEDDER_NAME

_MOST_TEXTS, _MOST_CHARACTERS = 2048, 1 << 17
"""The most texts of a request, and the most characters of all of them together: a request is worked on to its
end, even if its client has gone."""


class EmbeddingServer:
    """`E5` behind `/v1/embeddings`. Raises ConfigError when it is made."""

    def __init__(self, port: int, host: str = LOOPBACK) -> None:
        self._model = packaged_e5()
        self._host, self._port = host, port
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listen; returns the base URL."""
        app = web.Application(client_max_size=16 << 20)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        return f"http://{self._host}:{self._runner.addresses[0][1]}/v1"

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _embeddings(self, request: web.Request) -> web.Response:
        try:
            body: Any = msgspec.json.decode(await request.read())
            texts = msgspec.convert(
                [body["input"]] if isinstance(body["input"], str) else body["input"], list[str]
            )
            as_base64 = body.get("encoding_format") == "base64"
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            return _refusal(f"bad request: {error}")
        if len(texts) > _MOST_TEXTS or sum(map(len, texts)) > _MOST_CHARACTERS:
            return _refusal(f"more than {_MOST_TEXTS} texts, or than {_MOST_CHARACTERS} characters in all")
        vectors = await asyncio.to_thread(self._model.passage, texts)
        # msgspec writes bytes as base64.
        rows = [(one.astype("<f4").tobytes() if as_base64 else one.tolist()) for one in vectors]
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
        words = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": words, "total_tokens": words}
        reply = {"object": "list", "data": data, "model": EMBEDDER_NAME, "usage": usage}
        return web.Response(body=msgspec.json.encode(reply), content_type="application/json")

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": EMBEDDER_NAME, "object": "model"}]})


def _refusal(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)
