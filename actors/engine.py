"""The actors that serve the embedded model and embedder.

Ray starts, supervises and stops them. A restarted one listens on the same port, so that clients
need not be told: their next attempt just succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Collection, Sequence

import msgspec

from actors.lean import without_addons
from culturepark.models.embedded import serve
from culturepark.models.embedding_server import EmbeddingServer
from culturepark.settings import ModelSettings

without_addons()

_START_S = 60.0
_PORTS = range(20_000, 32_000)
"""Below those that systems give to whoever asks for any."""


class _Engine:
    """An engine in an actor, listening once it is made. Its servers work in threads of their own."""

    def rest(self) -> None:
        """Never return: Ray's thread costs nothing inside a call, see `Seat`."""
        threading.Event().wait()


class ChatEngine(_Engine):
    """llama.cpp's servers of a node."""

    def __init__(self, models: bytes, host: str, ports: Sequence[int]) -> None:
        self._servers = serve(msgspec.msgpack.decode(models, type=list[ModelSettings]), ports, host)


class EmbeddingEngine(_Engine):
    """The embedder, its server on a loop in a thread."""

    def __init__(self, host: str, port: int) -> None:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="embeddings", daemon=True).start()
        asyncio.run_coroutine_threadsafe(EmbeddingServer(port, host).start(), loop).result(_START_S)


def free_ports(host: str, count: int, promised: Collection[int]) -> list[int]:
    """Ports that are free on this machine now, but for those `promised` to others; an engine takes them soon,
    and again after a restart. Raises OSError if there are not so many."""
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if port in promised:
            continue
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((host, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"no {count} ports of {host} are free")
