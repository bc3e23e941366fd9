"""The actors that serve the embedded model and embedder.

Ray starts, supervises and stops them. A restarted one listens on the same port, so that clients
need not be told: their next attempt just succeeds.
"""

from __future__ import annotations

import asyncio
import socket
import threading

import msgspec

from culturepark.models.embedded import ChatServer, EmbeddingServer
from culturepark.settings import ModelSettings

_START_S = 60.0


class ChatEngine:
    """llama.cpp's server in an actor."""

    def __init__(self, model: bytes, host: str, port: int) -> None:
        self._server = ChatServer(msgspec.msgpack.decode(model, type=ModelSettings), port, host)

    def url(self) -> str:
        """Where it listens."""
        return self._server.url


class EmbeddingEngine:
    """The embedder in an actor, its server on a loop in a thread of its own."""

    def __init__(self, host: str, port: int) -> None:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="embeddings", daemon=True).start()
        started = asyncio.run_coroutine_threadsafe(EmbeddingServer(port, host).start(), loop)
        self._url = started.result(_START_S)

    def url(self) -> str:
        """Where it listens."""
        return self._url


def free_port(host: str) -> int:
    """A port that is free on this machine now; the engine takes it at once, and again after a restart."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])
