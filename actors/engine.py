"""The actors that serve the embedded model and embedder.

Ray starts, supervises and stops them. A restarted one listens on the same port, so that clients
need not be told: their next attempt just succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Sequence

import msgspec

from culturepark.models.embedded import serve
from culturepark.models.embedding_server import EmbeddingServer
from culturepark.settings import ModelSettings

_START_S = 60.0


class _Engine:
    """An engine in an actor. Its servers work in threads of their own."""

    def rest(self) -> None:
        """Never return: Ray's thread costs nothing inside a call, see `Seat`."""
        threading.Event().wait()


class ChatEngine(_Engine):
    """llama.cpp's servers of a node."""

    def __init__(self, models: bytes, host: str, ports: Sequence[int]) -> None:
        self._servers = serve(msgspec.msgpack.decode(models, type=list[ModelSettings]), ports, host)

    def urls(self) -> list[str]:
        """Where they listen."""
        return [server.url for server in self._servers]


class EmbeddingEngine(_Engine):
    """The embedder, its server on a loop in a thread."""

    def __init__(self, host: str, port: int) -> None:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="embeddings", daemon=True).start()
        started = asyncio.run_coroutine_threadsafe(EmbeddingServer(port, host).start(), loop)
        self._url = started.result(_START_S)

    def urls(self) -> list[str]:
        """Where it listens."""
        return [self._url]


def free_ports(host: str, count: int) -> list[int]:
    """Ports that are free on this machine now; an engine takes them at once, and again after a restart."""
    with contextlib.ExitStack() as held:
        socks = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind((host, 0))
        return [int(sock.getsockname()[1]) for sock in socks]
