"""The actors that serve the embedded model and embedder.

Ray starts, supervises and stops them. A restarted one listens on the same port, so that clients
need not be told: their next attempt just succeeds.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import threading
from collections.abc import Callable, Collection, Sequence

import msgspec

from actors.lean import without_addons
from culturepark.errors import CultureParkError, EndpointError
from culturepark.models.embedded import serve
from culturepark.models.embedding_server import EmbeddingServer
from culturepark.settings import ModelSettings

without_addons()

_START_S = 60.0
_SHOWN_CHARS = 240
_PORTS = range(20_000, 32_000)
"""Below those that systems give to whoever asks for any."""
_NOT_FREE = frozenset({errno.EADDRINUSE, errno.EACCES})


class _Engine:
    """An engine in an actor, listening once it is made, in threads of its own. It says what kept it from that
    when it is asked: an error in a constructor would reach nobody in words."""

    def __init__(self, start: Callable[[], object]) -> None:
        self._failure: CultureParkError | None = None
        try:
            self._served = start()
        except CultureParkError as error:
            self._failure = error
        except Exception as error:  # the engine's own
            what = f"its engine did not start: {str(error)[:_SHOWN_CHARS]}"
            fix = "Its weights may be damaged, or its port be taken: try `culturepark doctor`, or again."
            self._failure = EndpointError("embedded model", what, fix)

    def ready(self) -> None:
        """Return if it listens. Raises ConfigError, EndpointError."""
        if self._failure is not None:
            raise self._failure

    def rest(self) -> None:
        """Never return: Ray's thread costs nothing inside a call, see `Seat`. Raises as `ready`."""
        self.ready()
        threading.Event().wait()


class ChatEngine(_Engine):
    """llama.cpp's servers of a node."""

    def __init__(self, models: bytes, host: str, ports: Sequence[int]) -> None:
        parts = msgspec.msgpack.decode(models, type=list[ModelSettings])
        super().__init__(lambda: serve(parts, ports, host))


class EmbeddingEngine(_Engine):
    """The embedder, its server on a loop in a thread."""

    def __init__(self, host: str, port: int) -> None:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="embeddings", daemon=True).start()

        def start() -> str:
            server = EmbeddingServer(port, host)
            return asyncio.run_coroutine_threadsafe(server.start(), loop).result(_START_S)

        super().__init__(start)


def free_ports(host: str, count: int, promised: Collection[int]) -> list[int]:
    """Ports that are free on this machine now, but for those `promised` to others; an engine takes them soon,
    and again after a restart. Raises OSError if there are not so many, or this machine has no such host."""
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if port in promised:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno in _NOT_FREE:
                    continue
                raise
        ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"no {count} ports of {host} are free")
