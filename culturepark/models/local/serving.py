"""A model ready to be called: an embedded one is served by this process for as long as it is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from culturepark.errors import ConfigError
from culturepark.models.local.embedding_server import EmbeddingServer
from culturepark.models.local.engine import own_cpus, require_engine, serve_here
from culturepark.models.open import open_embedder
from culturepark.ports import Embedder
from culturepark.settings import ModelSettings, Settings


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
            yield replace(model, base_urls=(url,), parallel=own_cpus())
        finally:
            await vectors.stop()
        return
    _servers, ready = await asyncio.to_thread(serve_here, model)
    yield ready


@asynccontextmanager
async def local_embedder(settings: Settings) -> AsyncGenerator[Embedder | None]:
    """The run's embedder if it costs nothing, since it runs on this machine. None if it is a remote one, or
    is not installed here."""
    model = settings.models.get(settings.roles.embedder)
    if model is None or model.engine == "openai":
        yield None
        return
    if model.engine == "embedded":
        try:
            require_engine(model, embedder=True)
        except ConfigError:
            yield None
            return
    async with served(model, embedder=True) as ready:
        embedder = open_embedder(ready, settings.limits)
        try:
            yield embedder
        finally:
            await embedder.close()
