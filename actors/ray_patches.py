"""Patches of Ray (monkey patches) that leave out what a run does not use: it costs time when processes start,
and some of it always.

Ray has options for none of it. A version of Ray that does not have the names used here starts unchanged.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_OPTIONS = {"dashboard_agent_listen_port": 0, "no_monitor": True, "include_log_monitor": False}


@contextmanager
def without_unused_processes(started: list[Any]) -> Iterator[None]:
    """Ray starts within this without three processes that a session of one run does not need: the
    dashboard's, which starts even where none is included, the autoscaler's, and the one that forwards
    workers' logs to drivers, which ours does not print. Its agent listens on any free port: for Ray's usual
    one, which may be another session's, it would try for three seconds. `started` gets the
    nodes whose start was begun."""
    try:
        constants, nodes, parameters = _private("ray_constants"), _private("node"), _private("parameter")
        start_api_server, params = nodes.Node.start_api_server, parameters.RayParams
        address = constants.DASHBOARD_ADDRESS.encode(), b"127.0.0.1:1", True, constants.KV_NAMESPACE_DASHBOARD
    except (ImportError, AttributeError):
        yield
        return

    def without_dashboard(node: Any, *_: object, **__: object) -> None:
        started.append(node)
        # The node's agent asks for the address every second until there is one. Nothing listens there.
        node.get_gcs_client().internal_kv_put(*address)

    nodes.Node.start_api_server = without_dashboard
    accepted = inspect.signature(params).parameters
    parameters.RayParams = functools.partial(params, **{k: v for k, v in _OPTIONS.items() if k in accepted})
    try:
        yield
    finally:
        nodes.Node.start_api_server, parameters.RayParams = start_api_server, params


def without_addons() -> None:
    """Keep Ray from importing pydantic, pyarrow and starlette in this process to learn how to serialize their
    objects: none is ever sent. To be called before Ray sends or receives anything."""
    try:
        addons: Any = importlib.import_module("ray.util.serialization_addons")
    except ImportError:
        return
    addons.apply = lambda context: None


def _private(name: str) -> Any:
    return importlib.import_module(f"ray._private.{name}")
