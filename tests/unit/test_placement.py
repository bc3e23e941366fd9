"""How many processes a cluster gets, and where its engines run."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from msgspec.structs import replace

from actors import engine
from actors.placement import Node, engine_host, engine_nodes, worker_counts
from culturepark.limits.coordinator import known_limits
from culturepark.models.local.engine import listening, servers_of
from culturepark.settings import ActorSettings, ModelSettings

DRIVER = Node("a", "10.0.0.1", 4)
WORKER = Node("b", "10.0.0.2", 16.5)
BARE = Node("c", "10.0.0.3", 0)


@pytest.mark.parametrize(
    ("cpus", "cultures", "expected"),
    [(0, 9, (1, 1)), (1, 9, (1, 1)), (2, 9, (1, 1)), (8, 9, (1, 4)), (24, 3, (4, 12)), (4096, 9, (1, 16))],
)
def test_the_numbers_follow_from_the_cores(cpus: float, cultures: int, expected: tuple[int, int]) -> None:
    assert worker_counts(ActorSettings(), cultures, cpus) == expected


def test_what_is_set_stands() -> None:
    assert worker_counts(ActorSettings(agents_per_culture=3), 9, 64) == (3, 16)
    assert worker_counts(ActorSettings(refiners=5), 9, 2) == (1, 5)


def test_engines_go_to_nodes_with_cpus_the_drivers_first() -> None:
    assert engine_nodes([DRIVER, BARE, WORKER], 0) == [DRIVER, WORKER]
    assert engine_nodes([BARE, DRIVER, WORKER], 1) == [DRIVER]
    assert engine_nodes([DRIVER, WORKER], 9) == [DRIVER, WORKER]
    assert engine_nodes([BARE], 0) == [BARE]


def test_an_engine_leaves_loopback_only_for_other_machines() -> None:
    assert engine_host([DRIVER], DRIVER) == "127.0.0.1"
    assert engine_host([DRIVER, Node("d", DRIVER.ip, 2)], DRIVER) == "127.0.0.1"
    assert engine_host([DRIVER, WORKER], WORKER) == WORKER.ip


def test_engines_get_ports_that_are_free_and_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as used, socket.socket() as left, socket.socket() as promised:
        ports: list[int] = []
        for sock in (used, left, promised):
            sock.bind(("127.0.0.1", 0))
            ports.append(sock.getsockname()[1])
        left.close()
        promised.close()
        monkeypatch.setattr(engine, "_PORTS", ports)
        assert engine.free_ports("127.0.0.1", 1, [ports[2]]) == [ports[1]]
        with pytest.raises(OSError, match="are free"):
            engine.free_ports("127.0.0.1", 3, ())


@pytest.mark.parametrize(
    ("changed", "cpus", "expected"),
    [
        ({}, 2, [(1, 8)] * 2),
        ({}, 0, [(1, 8)]),
        ({}, 64, [(1, 8)] * 16),
        ({"parallel": 9}, 2, [(1, 5), (1, 4)]),
        ({"parallel": 1}, 16, [(1, 1)]),
        ({"threads": 2}, 4, [(2, 8)]),
        ({"path": "own.gguf"}, 4, [(4, 8)]),
        ({"hub": "owner/name:own.gguf", "parallel": 3}, 4, [(4, 3)]),
        ({"gpu_layers": 99}, 4, [(4, 8)]),
    ],
)
def test_the_packaged_model_gets_a_server_for_each_cpu(
    changed: dict[str, Any], cpus: int, expected: list[tuple[int, int]]
) -> None:
    parts = servers_of(ModelSettings(engine="embedded", **changed), cpus)
    assert [(part.threads, part.parallel) for part in parts] == expected


def test_servers_of_our_own_are_asked_as_much_as_they_work_on_and_half_as_much_again() -> None:
    model = ModelSettings(engine="embedded", model="same", parallel=9)
    served = listening(model, ["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"], servers_of(model, 2))
    other = replace(model, base_urls=("http://127.0.0.1:3/v1",), parallel=1)
    remote = ModelSettings(engine="openai", model="same", base_urls=("http://127.0.0.1:4/v1",))
    assert known_limits([served, other, remote, model]) == {
        "http://127.0.0.1:1/v1": 8,  # of the five that the larger part works on
        "http://127.0.0.1:2/v1": 8,
        "http://127.0.0.1:3/v1": 2,
    }
