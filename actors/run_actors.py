"""The actors of a run in Ray's terms: remote classes, options, names, placement, restarts."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.collector import Collector
from actors.cultural_agent import CulturalAgent
from actors.engine import Engines
from actors.moderator import Moderator
from actors.placement import Node, worker_counts
from actors.raylet import Raylet
from actors.refiner import RefinerActor
from actors.run_context import RunContext
from actors.threaded import ThreadedActor, threaded
from actors.trainer import Trainer
from culturepark.dialogue.slots import REFINERS
from culturepark.errors import ConfigError
from culturepark.settings import Settings
from culturepark.store.rundir import Run
from culturepark.training.jobs import detach_all

_CONCURRENCY = 100_000
"""Concurrent calls of an actor with coroutines: Ray's default of 1,000 is less than the dialogues that one
may hold. An actor without coroutines would get as many threads."""

_CPU = 0.001
"""CPUs that an agent or refiner claims of a node: enough that Ray places it on a node that has CPUs."""

_ROOM_S = 30.0
"""Seconds to wait for enough CPUs that no other job has claimed."""
_TRAINER_STOP_S = 30.0
"""Seconds to wait for the trainer to stop its training."""


class RunActors:
    """The actors of one run. They and their engines start beside each other; `close` ends them."""

    def __init__(self, run: Run) -> None:
        self._run = run
        driver = ray.get_runtime_context().get_node_id()
        self._nodes = _nodes(driver)
        self.raylet = Raylet()
        self._on_this_node = NodeAffinitySchedulingStrategy(driver, soft=False)
        self._actors: list[Any] = []
        self.engines = Engines(self._nodes, run.settings.actors.engines)
        settings = self.engines.serve(run.settings)
        self._context = context = RunContext.of(run, settings).packed()
        # Two runs on one cluster must not meet; the directory's lock keeps one run from running twice.
        self._namespace = f"culturepark-{run.file.run_id}-{secrets.token_hex(4)}"
        credentials = (self._namespace, secrets.token_hex(16))  # the token authenticates senders to inboxes

        cultures = run.plan.agent_cultures()
        cpus = sum(node.cpus for node in self._nodes)
        agents, refiners = worker_counts(settings.actors, len(cultures), cpus)
        _require_room(_CPU * (agents * len(cultures) + refiners))
        replicas = {**dict.fromkeys(cultures, agents), REFINERS: refiners}
        # The run directory is on this node, so its only writer is, too. Ray starts few processes at a time,
        # in this order, after the engines: dialogues begin with the first agents, while others are starting.
        self.trainer = self._trainer(settings) if settings.training.launch else None
        self.collector = self._actor(Collector, "collector", context, credentials, self.trainer, here=True)
        self.moderator = self._actor(Moderator, "moderator", context, credentials, replicas, here=True)
        for culture, count in replicas.items():
            for i in range(count):
                if culture == REFINERS:
                    cls, address = RefinerActor, f"refiner/{i}"
                else:
                    cls, address = CulturalAgent, f"agent/{culture}/{i}"
                self._actor(threaded(cls), address, context, address, credentials)

    def close(self) -> None:
        """End all actors."""
        if self.trainer is not None:
            with contextlib.suppress(RayError):  # it may have died
                ray.get(self.trainer.stop.remote(), timeout=_TRAINER_STOP_S)
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self.engines.close()
        if self.trainer is not None:
            detach_all(self._run)  # what an earlier trainer launched, or one that could not be asked to stop
        self.raylet.close()

    def _actor(self, cls: type, name: str, *args: Any, here: bool = False) -> Any:
        options: dict[str, Any] = {
            "name": name,
            "namespace": self._namespace,
            "num_cpus": 0 if here else _CPU,
            "scheduling_strategy": self._on_this_node if here else "SPREAD",
            "max_restarts": -1,
            # Ray would run a retried call twice without a sign of it; we ask again by our own ids.
            "max_task_retries": 0,
            "max_concurrency": 1 if issubclass(cls, ThreadedActor) else _CONCURRENCY,
        }
        actor = ray.remote(cls).options(**options).remote(*args)
        self._actors.append(actor)
        return actor

    def _trainer(self, settings: Settings) -> Any:
        """With CPUs of its own on the driver's node, where the run directory is."""
        options: dict[str, Any] = {
            "num_cpus": min(settings.training.cpus, max(_CPU, self._nodes[0].cpus - 1)),
            "scheduling_strategy": self._on_this_node,
            "max_restarts": -1,
            "max_concurrency": 8,
        }
        trainer = ray.remote(Trainer).options(**options).remote(self._context, os.getpid())
        self._actors.append(trainer)
        return trainer


def _nodes(driver: str) -> list[Node]:
    """The nodes that are alive, the driver's first."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"].get("CPU", 0.0)) for node in alive
    ]
    return sorted(nodes, key=lambda node: (node.id != driver, node.ip, node.id))


def _require_room(cpus: float) -> None:
    """Wait for CPUs that no job has claimed. Raises ConfigError rather than let actors wait unseen."""
    deadline = time.monotonic() + _ROOM_S
    while ray.available_resources().get("CPU", 0.0) < cpus:
        if time.monotonic() > deadline:
            what = f"none of its nodes has had {cpus:g} CPUs free for agents for {_ROOM_S:.0f} s."
            fix = "Wait for other jobs to end, add a node, or start one with `--num-cpus`."
            raise ConfigError("the cluster", what, fix)
        time.sleep(0.1)
