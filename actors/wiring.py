"""The only place for Ray's own words: remote classes, options, names, placement, restarts."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import ray
from msgspec.structs import replace
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.collector import Collector
from actors.cultural_agent import CulturalAgent
from actors.engine import ChatEngine, EmbeddingEngine
from actors.inputs import Inputs
from actors.moderator import Moderator
from actors.refiner import RefinerActor
from culturepark.conductor import REFINERS
from culturepark.models.embedded import embedded_name
from culturepark.settings import ModelSettings, Settings
from culturepark.store.rundir import Run

_HOME_PREFIX, _OWNER = "culturepark-ray-", "owner.lock"

_CONCURRENCY = 100_000
"""Ray's default of 1,000 calls at once is less than the dialogues that one actor may hold."""


@contextmanager
def ray_session() -> Iterator[None]:
    """The cluster this process was submitted to, or else a private one for this process alone.

    A private one listens on loopback, with token authentication, without a dashboard, in a
    temporary directory that only this user can enter and that is removed at the end.
    """
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()
        return
    home, owner = _private_home()
    try:
        ray.init(
            address="local",
            _temp_dir=str(Path(home, "ray")),  # Ray opens this one to all; the one above stays closed
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=128 << 20,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(home, ignore_errors=True)
        os.close(owner)


def _private_home() -> tuple[str, int]:
    """A new temporary directory for one Ray session, and the open lock that says it is in use.

    Sessions whose process was killed leave theirs behind: those that are this user's, and that
    nobody holds any more, are removed.
    """
    for lock in Path(tempfile.gettempdir()).glob(f"{_HOME_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError):
            if lock.stat().st_uid != os.getuid():
                continue
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
    home = tempfile.mkdtemp(prefix=_HOME_PREFIX)  # mode 0700; short, since sockets live below it
    owner = os.open(Path(home, _OWNER), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(owner, fcntl.LOCK_EX)
    return home, owner


class Crew:
    """The actors of one run. Made whole or not at all; `close` ends them."""

    def __init__(self, run: Run) -> None:
        self._here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._engines: list[Any] = []
        self._actors: list[Any] = []
        settings = self._served(run.settings)
        self._pinned = any(model.engine == "embedded" for model in settings.models.values())
        inputs = Inputs.of(run, settings).to_bytes()
        # Two runs on one cluster must not meet; the directory's lock keeps one run from running twice.
        self._namespace = f"culturepark-{run.file.run_id}-{secrets.token_hex(4)}"

        # The run directory is on this node, so its only writer is, too.
        self.collector = self._actor(Collector, "collector", inputs, here=True)
        replicas = dict.fromkeys(run.plan.agent_cultures(), settings.actors.agents_per_culture)
        replicas[REFINERS] = settings.actors.refiners
        for culture, count in replicas.items():
            for i in range(count):
                if culture == REFINERS:
                    self._actor(RefinerActor, f"refiner/{i}", inputs, f"refiner/{i}", self._namespace)
                else:
                    address = f"agent/{culture}/{i}"
                    self._actor(CulturalAgent, address, inputs, address, self._namespace)
        self.moderator = self._actor(Moderator, "moderator", inputs, self._namespace, replicas, here=True)

    def close(self) -> None:
        """End all actors."""
        for actor in (*self._actors, *self._engines):
            ray.kill(actor, no_restart=True)

    def _actor(self, cls: type, name: str, *args: Any, here: bool = False) -> Any:
        options: dict[str, Any] = {
            "name": name,
            "namespace": self._namespace,
            "num_cpus": 0,
            "max_restarts": -1,
            # A retried call would run twice without telling anyone; we ask again by our own ids.
            "max_task_retries": 0,
            "max_concurrency": _CONCURRENCY,
        }
        if here or self._pinned:
            options["scheduling_strategy"] = self._here
        actor = ray.remote(cls).options(**options).remote(*args)
        self._actors.append(actor)
        return actor

    def _served(self, settings: Settings) -> Settings:
        """Start a server for each embedded model in use, and say where it listens."""
        roles = settings.roles
        embedder = roles.embedder if settings.refine.enabled else ""
        used = {name for name in (roles.speaker, roles.extractor, roles.verifier, roles.rewriter) if name}
        models = dict(settings.models)
        for name in sorted({*used, embedder} - {""}):
            if models[name].engine == "embedded":
                models[name] = self._serve(models[name], embedder=name == embedder)
        return replace(settings, models=models)

    def _serve(self, model: ModelSettings, embedder: bool) -> ModelSettings:
        port = _free_port()
        model = replace(model, model=model.model or embedded_name(model, embedder).split(" ")[0])
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": self._here}
        if embedder:
            engine: Any = ray.remote(EmbeddingEngine).options(**options).remote(port)
        else:
            engine = ray.remote(ChatEngine).options(**options).remote(msgspec.msgpack.encode(model), port)
        self._engines.append(engine)
        url: str = ray.get(engine.url.remote(), timeout=120)
        return replace(model, base_urls=(url,))


def _free_port() -> int:
    """A port that is free now; the engine takes it at once, and again after a restart."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
