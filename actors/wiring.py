"""The actors of a run in Ray's own words: remote classes, options, names, placement, restarts."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from typing import Any

import msgspec
import ray
from msgspec.structs import replace
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.collector import Collector
from actors.cultural_agent import CulturalAgent
from actors.directory import cause_of
from actors.engine import ChatEngine, EmbeddingEngine, free_ports
from actors.inputs import Inputs
from actors.moderator import Moderator
from actors.placement import Node, engine_host, engine_nodes, staff
from actors.raylet import Raylet
from actors.refiner import RefinerActor
from actors.seat import Seat, seated
from actors.trainer import Trainer
from culturepark.conductor import REFINERS
from culturepark.errors import ConfigError, EndpointError
from culturepark.models.embedded import embedded_name, listening, shares
from culturepark.settings import ModelSettings, Settings
from culturepark.store.rundir import Run
from culturepark.training.launch import detach_all

_CONCURRENCY = 100_000
"""Of an actor with coroutines. Ray's default of 1,000 calls at once is less than the dialogues that one may
hold. Of any other it would be that many threads."""

_CPU = 0.001
"""What an agent or refiner claims of a node: enough that Ray gives them to nodes with CPUs alone."""

_MODEL, _ENGINE_FIX = "embedded model", "The machine may be short of memory: try `culturepark doctor`."
_ENGINE_START_S = 300.0
_LOOK_S = 0.5
_ROOM_S = 30.0
_TRAINER_STOP_S = 30.0


class Crew:
    """The actors of one run. They and their engines start beside each other; `close` ends them."""

    def __init__(self, run: Run) -> None:
        self._run = run
        driver = ray.get_runtime_context().get_node_id()
        self._nodes = _nodes(driver)
        self.raylet = Raylet()
        self._here = NodeAffinitySchedulingStrategy(driver, soft=False)
        self._engines: list[Any] = []
        self._listening: list[Any] = []
        self._ports: list[int] = []
        self._resting: list[Any] = []
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
        # in this order, after the engines: dialogues begin with the first agents, while others are starting.
        self.trainer = self._trainer(settings) if settings.training.launch else None
        self.collector = self._actor(Collector, "collector", inputs, post, self.trainer, here=True)
        self.moderator = self._actor(Moderator, "moderator", inputs, post, replicas, here=True)
        for culture, count in replicas.items():
            for i in range(count):
                if culture == REFINERS:
                    self._actor(seated(RefinerActor), f"refiner/{i}", inputs, f"refiner/{i}", post)
                else:
                    address = f"agent/{culture}/{i}"
                    self._actor(seated(CulturalAgent), address, inputs, address, post)

    def await_engines(self, stop: threading.Event) -> None:
        """Wait until all engines listen, or `stop` is set. Raises ConfigError, EndpointError."""
        deadline = time.monotonic() + _ENGINE_START_S
        waiting = self._listening
        while waiting and not stop.is_set():
            told, waiting = ray.wait(waiting, timeout=_LOOK_S)
            try:
                ray.get(told)
            except RayTaskError as error:
                raise cause_of(error) from None
            except RayActorError as error:
                what = f"its engine is gone: {str(error).splitlines()[0][:200]}"
                raise EndpointError(_MODEL, what, _ENGINE_FIX) from None
            if waiting and time.monotonic() > deadline:
                what = f"its engine does not listen after {_ENGINE_START_S:.0f} s."
                raise EndpointError(_MODEL, what, _ENGINE_FIX)

    def look_at_engines(self) -> None:
        """Raises ConfigError, EndpointError if an engine that was started again cannot listen any more. One
        whose node is lost is no matter as long as others of its model go on."""
        if self._resting:
            told, _ = ray.wait(self._resting, num_returns=len(self._resting), timeout=0)
            for one in told:
                try:
                    ray.get(one)
                except RayTaskError as error:
                    raise cause_of(error) from None
                except RayActorError:
                    self._resting.remove(one)

    def close(self) -> None:
        """End all actors."""
        if self.trainer is not None:
            with contextlib.suppress(RayError):  # it may have died
                ray.get(self.trainer.stop.remote(), timeout=_TRAINER_STOP_S)
        for actor in (*self._actors, *self._engines):
            ray.kill(actor, no_restart=True)
        if self.trainer is not None:
            detach_all(self._run)  # what a predecessor of it launched, or it could not be asked to stop
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
            "max_concurrency": 1 if issubclass(cls, Seat) else _CONCURRENCY,
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
        trainer = ray.remote(Trainer).options(**options).remote(self._inputs, os.getpid())
        self._actors.append(trainer)
        return trainer

    def _served(self, settings: Settings) -> Settings:
        """Start servers for each embedded model in use, and say where they will listen."""
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
        urls: list[str] = []
        parts: list[ModelSettings] = []
        for node in engine_nodes(self._nodes, self._engines_wanted):
            options: dict[str, Any] = {
                "num_cpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
            }
            host = engine_host(self._nodes, node)
            cpus = int(node.cpus)
            servers = [replace(model, parallel=max(1, cpus))] if embedder else shares(model, cpus)
            if node is self._nodes[0]:
                ports = free_ports(host, len(servers), self._ports)
            else:
                asked = ray.remote(free_ports).options(**options).remote(host, len(servers), self._ports)
                ports = ray.get(asked, timeout=_ENGINE_START_S)
            self._ports += ports
            parts += servers
            urls += [f"http://{host}:{port}/v1" for port in ports]
            options |= {"max_restarts": -1, "max_task_retries": -1}  # a new one rests like the old one
            if embedder:
                engine: Any = ray.remote(EmbeddingEngine).options(**options).remote(host, *ports)
            else:
                packed = msgspec.msgpack.encode(servers)
                engine = ray.remote(ChatEngine).options(**options).remote(packed, host, ports)
            self._engines.append(engine)
            self._listening.append(engine.ready.remote())
            self._resting.append(engine.rest.remote())
        return listening(model, urls, parts)


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
