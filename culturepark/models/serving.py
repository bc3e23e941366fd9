"""A model ready to be called: an embedded one is served by this process for as long as it is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from culturepark.models.embedded import EmbeddingServer, require_engine, serve_here
from culturepark.settings import ModelSettings


@asynccontextmanager
async def served(model: ModelSettings, embedder: bool = False) -> AsyncGenerator[ModelSettings]:
    """The model with an address to call. Raises ConfigError if an embedded one is not installed."""
    if model.engine != "embedded":
        yield model
        return
    require_engine(model, embedder)
    if embedder:
        vectors = EmbeddingServer(0)
        url = await vectors.start()
        try:
            yield replace(model, base_urls=(url,))
        finally:
            await vectors.stop()
        return
    servers = await asyncio.to_thread(serve_here, model)
    yield replace(model, base_urls=tuple(server.url for server in servers))
