"""The only place for Ray's own words: remote classes, options, names, placement, restarts."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import ray
from msgspec.structs import replace
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import METRICS_INTERVAL, METRICS_SELDOM
from actors.collector import Collector
from actors.cultural_agent import CulturalAgent
from actors.directory import cause_of
from actors.engine import ChatEngine, EmbeddingEngine, free_ports
from actors.inputs import Inputs
from actors.moderator import Moderator
from actors.placement import Node, engine_host, engine_nodes, staff
from actors.raylet import Raylet
from actors.refiner import RefinerActor
from actors.trainer import Trainer
from culturepark.conductor import REFINERS
from culturepark.errors import ConfigError
from culturepark.models.embedded import embedded_name, shares
from culturepark.settings import ModelSettings, Settings, shown_address
from culturepark.store.rundir import Run

_HOME_PREFIX, _OWNER = "culturepark-ray-", "owner.lock"
_BEING_MADE_S = 60.0
"""A directory without an owner that is younger than this may be another session's that just begins."""

_CONCURRENCY = 100_000
"""Ray's default of 1,000 calls at once is less than the dialogues that one actor may hold."""

_CPU = 0.001
"""What an agent or refiner claims of a node: enough that Ray gives them to nodes with CPUs alone."""

_METRICS_OFTEN_MS = "5000"

_ENGINE_START_S = 120.0
_ROOM_S = 30.0
_TRAINER_STOP_S = 30.0


@contextmanager
def ray_session(metrics_port: int = 0) -> Iterator[None]:
    """The cluster this process was submitted to, or else a private one for this process alone.

    A private one listens on loopback, with token authentication, without a dashboard, in a
    temporary directory that only this user can enter and that is removed at the end. Its metrics can
    be read at `metrics_port`, unless that is 0. Raises ConfigError.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        _join(address)
        try:
            yield
        finally:
            ray.shutdown()
        return
    options = _metrics_options(metrics_port) if metrics_port else {}
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
            **options,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(home, ignore_errors=True)
        os.close(owner)


def _join(address: str) -> None:
    """Become a driver on the cluster that RAY_ADDRESS names. Raises ConfigError."""
    try:
        if "://" in address:
            raise ValueError("it is the address of a job server")
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ValueError, RuntimeError, OSError) as error:
        ray.shutdown()
        what = f"no cluster can be joined at {shown_address(address)}: {str(error).splitlines()[0][:200]}."
        fix = "Submit the run with `ray job submit`, or unset RAY_ADDRESS to run on this machine alone."
        raise ConfigError("RAY_ADDRESS", what, fix) from None


def _metrics_options(port: int) -> dict[str, Any]:
    """How Ray is told to serve metrics at `port`, and to collect them often. Raises ConfigError."""
    with socket.socket() as probe:
        # Ray's own agent would die of a port in use, without a word.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            what = f"port {port} cannot be used: {(error.strerror or str(error)).lower()}."
            fix = "Name a port that is free, or 0 for no metrics."
            raise ConfigError("$.actors.metrics_port", what, fix) from None
    if os.environ.get(METRICS_INTERVAL) == METRICS_SELDOM:  # not a user's own
        os.environ[METRICS_INTERVAL] = _METRICS_OFTEN_MS
    return {"_metrics_export_port": port}


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
    # A dying Ray process may write into its directory once more after it was removed.
    for place in Path(tempfile.gettempdir()).glob(f"{_HOME_PREFIX}*"):
        with contextlib.suppress(OSError):
            about = place.stat()
            old = time.time() - about.st_mtime > _BEING_MADE_S
            if about.st_uid == os.getuid() and old and not (place / _OWNER).exists():
                shutil.rmtree(place, ignore_errors=True)
    home = tempfile.mkdtemp(prefix=_HOME_PREFIX)  # mode 0700; short, since sockets live below it
    owner = os.open(Path(home, _OWNER), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(owner, fcntl.LOCK_EX)
    return home, owner


class Crew:
    """The actors of one run. Made whole or not at all; `close` ends them."""

    def __init__(self, run: Run) -> None:
        driver = ray.get_runtime_context().get_node_id()
        self._nodes = _nodes(driver)
        self.raylet = Raylet()
        self._here = NodeAffinitySchedulingStrategy(driver, soft=False)
        self._engines: list[Any] = []
        self._actors: list[Any] = []
        self._engines_wanted = run.settings.actors.engines
        settings = self._served(run.settings)
        self._inputs = inputs = Inputs.of(run, settings).handed_out()
        # Two runs on one cluster must not meet; the directory's lock keeps one run from running twice.
        self._namespace = f"culturepark-{run.file.run_id}-{secrets.token_hex(4)}"
        post = (self._namespace, secrets.token_hex(16))  # what opens the doors of this run's actors

        cultures = run.plan.agent_cultures()
        agents, refiners = staff(settings.actors, len(cultures), sum(node.cpus for node in self._nodes))
        _require_room(_CPU * (agents * len(cultures) + refiners))
        replicas = {**dict.fromkeys(cultures, agents), REFINERS: refiners}
        # The run directory is on this node, so its only writer is, too. Ray starts few processes at a time,
        # in this order: dialogues begin with the first agents, while others are still starting.
        self.trainer = self._trainer(settings) if settings.training.launch else None
        self.collector = self._actor(Collector, "collector", inputs, post, self.trainer, here=True)
        self.moderator = self._actor(Moderator, "moderator", inputs, post, replicas, here=True)
        for culture, count in replicas.items():
            for i in range(count):
                if culture == REFINERS:
                    self._actor(RefinerActor, f"refiner/{i}", inputs, f"refiner/{i}", post)
                else:
                    address = f"agent/{culture}/{i}"
                    self._actor(CulturalAgent, address, inputs, address, post)

    def close(self) -> None:
        """End all actors."""
        if self.trainer is not None:
            with contextlib.suppress(RayError):  # it may have died; its training is found on resume
                ray.get(self.trainer.stop.remote(), timeout=_TRAINER_STOP_S)
        for actor in (*self._actors, *self._engines):
            ray.kill(actor, no_restart=True)
        self.raylet.close()

    def _actor(self, cls: type, name: str, *args: Any, here: bool = False) -> Any:
        options: dict[str, Any] = {
            "name": name,
            "namespace": self._namespace,
            "num_cpus": 0 if here else _CPU,
            "scheduling_strategy": self._here if here else "SPREAD",
            "max_restarts": -1,
            # A retried call would run twice without telling anyone; we ask again by our own ids.
            "max_task_retries": 0,
            "max_concurrency": _CONCURRENCY,
        }
        actor = ray.remote(cls).options(**options).remote(*args)
        self._actors.append(actor)
        return actor

    def _trainer(self, settings: Settings) -> Any:
        """With CPUs of its own on the driver's node, where the run directory is."""
        options: dict[str, Any] = {
            "num_cpus": min(settings.training.cpus, max(_CPU, self._nodes[0].cpus - 1)),
            "scheduling_strategy": self._here,
            "max_restarts": -1,
            "max_concurrency": 8,
        }
        trainer = ray.remote(Trainer).options(**options).remote(self._inputs)
        self._actors.append(trainer)
        return trainer

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
        """Start the servers of a model, on each of its nodes: replicas of one endpoint."""
        model = replace(model, model=model.model or embedded_name(model, embedder).split(" ")[0])
        starting: list[Any] = []
        for node in engine_nodes(self._nodes, self._engines_wanted):
            options: dict[str, Any] = {
                "num_cpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
            }
            host = engine_host(self._nodes, node)
            servers = [model] if embedder else shares(model, int(node.cpus))
            if node is self._nodes[0]:
                ports = free_ports(host, len(servers))
            else:
                asked = ray.remote(free_ports).options(**options).remote(host, len(servers))
                ports = ray.get(asked, timeout=_ENGINE_START_S)
            options["max_restarts"] = -1
            if embedder:
                engine: Any = ray.remote(EmbeddingEngine).options(**options).remote(host, *ports)
            else:
                packed = msgspec.msgpack.encode(servers)
                engine = ray.remote(ChatEngine).options(**options).remote(packed, host, ports)
            self._engines.append(engine)
            starting.append(engine.urls.remote())
        try:
            urls: list[list[str]] = ray.get(starting, timeout=_ENGINE_START_S)
        except RayTaskError as error:
            raise cause_of(error) from None
        return replace(model, base_urls=tuple(itertools.chain(*urls)))


def _nodes(driver: str) -> list[Node]:
    """The nodes that are alive, the driver's first."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"].get("CPU", 0.0)) for node in alive
    ]
    return sorted(nodes, key=lambda node: (node.id != driver, node.ip, node.id))


def _require_room(cpus: float) -> None:
    """Wait for CPUs that nobody has claimed. Raises ConfigError rather than let actors wait unseen."""
    deadline = time.monotonic() + _ROOM_S
    while ray.available_resources().get("CPU", 0.0) < cpus:
        if time.monotonic() > deadline:
            what = f"none of its nodes has had {cpus:g} CPUs free for agents for {_ROOM_S:.0f} s."
            fix = "Wait for other jobs to end, add a node, or start one with `--num-cpus`."
            raise ConfigError("the cluster", what, fix)
        time.sleep(0.1)
