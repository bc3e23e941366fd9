"""The actors that serve the embedded model and embedder, and how a run has them started.

Ray starts, supervises and stops them. A restarted one listens on the same port, so that clients
need no new address: their next attempt succeeds.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
import ray
from msgspec.structs import replace
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.placement import Node, engine_host, engine_nodes
from actors.ray_patches import without_addons
from actors.supervision import cause_of
from culturepark.errors import CultureParkError, EndpointError
from culturepark.models.local.embedding_server import EmbeddingServer
from culturepark.models.local.engine import embedded_name, listening, serve, servers_of
from culturepark.settings import ModelSettings, Settings

without_addons()  # here, as Ray reads an actor's arguments as soon as it has imported its class

_START_S, _ALL_START_S = 60.0, 300.0
"""Seconds within which the embedder's server has to start, and all engines of a run."""
_POLL_S = 0.5
"""Seconds between checks for a request to stop while engines start."""
_SHOWN_CHARS = 240
"""Characters of an engine's own error that are shown."""
_PORTS = range(20_000, 32_000)
"""Ports for engines: below those that systems give to programs that ask for any (ephemeral ports)."""
_MODEL, _FIX = "embedded model", "The machine may be short of memory: try `culturepark doctor`."
_NOT_FREE = frozenset({errno.EADDRINUSE, errno.EACCES})
"""Errors of binding to a port that another may be free of."""


class _Engine:
    """An engine in an actor, listening once it is made, in threads of its own. It tells what kept it from
    that when it is asked: an error in a constructor would reach no user in words."""

    def __init__(self, start: Callable[[], object]) -> None:
        self._failure: CultureParkError | None = None
        try:
            self._served = start()
        except CultureParkError as error:
            self._failure = error
        except Exception as error:  # the engine's own
            what = f"its engine did not start: {str(error)[:_SHOWN_CHARS]}"
            fix = "Its weights may be damaged, or its port in use: try `culturepark doctor`, or again."
            self._failure = EndpointError(_MODEL, what, fix)

    def ready(self) -> None:
        """Return if it listens. Raises ConfigError, EndpointError."""
        if self._failure is not None:
            raise self._failure

    def run_forever(self) -> None:
        """Never return: Ray's thread costs nothing inside a call, see `ThreadedActor`. Raises as `ready`."""
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
    """Ports that are free on this machine now, except those `promised` to others; an engine listens on them
    soon, and again after a restart. Raises OSError if too few are free, or this machine has no such host."""
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


class Engines:
    """The engines of a run, from their start to their end."""

    def __init__(self, nodes: Sequence[Node], wanted: int) -> None:
        """`nodes` are the cluster's, the driver's first; `wanted` of them serve a model, 0 for all."""
        self._nodes = nodes
        self._wanted = wanted
        self._actors: list[Any] = []
        self._starting: list[Any] = []
        """Calls that return once an engine listens."""
        self._running: list[Any] = []
        """Calls that return only when an engine has failed."""
        self._ports: list[int] = []

    def serve(self, settings: Settings) -> Settings:
        """Start servers for each embedded model in use; returns settings that name where they will listen."""
        roles = settings.roles
        embedder = roles.embedder if settings.refine.enabled else ""
        used = {name for name in (roles.speaker, roles.extractor, roles.verifier, roles.rewriter) if name}
        models = dict(settings.models)
        for name in sorted({*used, embedder} - {""}):
            if models[name].engine == "embedded":
                models[name] = self._serve(models[name], embedder=name == embedder)
        return replace(settings, models=models)

    def _serve(self, model: ModelSettings, embedder: bool) -> ModelSettings:
        """Start the servers of a model on each of its nodes (replicas of one endpoint)."""
        model = replace(model, model=model.model or embedded_name(model, embedder).split(" ")[0])
        urls: list[str] = []
        parts: list[ModelSettings] = []
        for node in engine_nodes(self._nodes, self._wanted):
            options: dict[str, Any] = {
                "num_cpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
            }
            host = engine_host(self._nodes, node)
            cpus = int(node.cpus)
            servers = [replace(model, parallel=max(1, cpus))] if embedder else servers_of(model, cpus)
            if node is self._nodes[0]:
                ports = free_ports(host, len(servers), self._ports)
            else:
                asked = ray.remote(free_ports).options(**options).remote(host, len(servers), self._ports)
                ports = ray.get(asked, timeout=_ALL_START_S)
            self._ports += ports
            parts += servers
            urls += [f"http://{host}:{port}/v1" for port in ports]
            options |= {"max_restarts": -1, "max_task_retries": -1}  # a restarted one gets the call again
            if embedder:
                engine: Any = ray.remote(EmbeddingEngine).options(**options).remote(host, *ports)
            else:
                packed = msgspec.msgpack.encode(servers)
                engine = ray.remote(ChatEngine).options(**options).remote(packed, host, ports)
            self._actors.append(engine)
            self._starting.append(engine.ready.remote())
            self._running.append(engine.run_forever.remote())
        return listening(model, urls, parts)

    def wait(self, stop: threading.Event) -> None:
        """Wait until all listen, or `stop` is set. Raises ConfigError, EndpointError."""
        deadline = time.monotonic() + _ALL_START_S
        waiting = self._starting
        while waiting and not stop.is_set():
            ready, waiting = ray.wait(waiting, timeout=_POLL_S)
            try:
                ray.get(ready)
            except RayTaskError as error:
                raise cause_of(error) from None
            except RayError as error:  # its node has no room for it, or is lost
                what = f"its engine is gone: {str(error).splitlines()[0][:200]}"
                raise EndpointError(_MODEL, what, _FIX) from None
            if waiting and time.monotonic() > deadline:
                what = f"its engine does not listen after {_ALL_START_S:.0f} s."
                raise EndpointError(_MODEL, what, _FIX)

    def check(self) -> None:
        """Raises ConfigError, EndpointError if one that was restarted cannot listen any more. One that is
        gone with its node is forgotten: the others of its model go on."""
        if self._running:
            ended, _ = ray.wait(self._running, num_returns=len(self._running), timeout=0)
            for one in ended:
                try:
                    ray.get(one)
                except RayTaskError as error:
                    raise cause_of(error) from None
                except RayError:
                    self._running.remove(one)

    def close(self) -> None:
        """End all."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
