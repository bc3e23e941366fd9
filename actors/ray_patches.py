"""What a run has no use for in Ray, left out: it costs time when processes start, and some of it always.

Ray has options for none of it. A version of Ray that has not the names used here starts as it comes.
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
def lean_start(begun: list[Any]) -> Iterator[None]:
    """Ray starts within this without three processes that a session of one run does not need: one that would
    serve a dashboard, even where none is included, one that asks for further nodes, and one that hands
    workers' words on to drivers, which ours does not listen to. Its agent takes any free port: of Ray's usual
    one, which is another session's if there is one, it lets go after three seconds. `begun` gets the nodes
    whose start was begun."""
    try:
        constants, nodes, parameters = _private("ray_constants"), _private("node"), _private("parameter")
        serve, params = nodes.Node.start_api_server, parameters.RayParams
        place = constants.DASHBOARD_ADDRESS.encode(), b"127.0.0.1:1", True, constants.KV_NAMESPACE_DASHBOARD
    except (ImportError, AttributeError):
        yield
        return

    def unserved(node: Any, *_: object, **__: object) -> None:
        begun.append(node)
        # The node's agent asks for the address every second until there is one. Nothing listens there.
        node.get_gcs_client().internal_kv_put(*place)

    nodes.Node.start_api_server = unserved
    known = inspect.signature(params).parameters
    parameters.RayParams = functools.partial(params, **{k: v for k, v in _OPTIONS.items() if k in known})
    try:
        yield
    finally:
        nodes.Node.start_api_server, parameters.RayParams = serve, params


def without_addons() -> None:
    """Let Ray not import pydantic, pyarrow and starlette in this process so as to know how objects of theirs
    are sent: none is. To be called before Ray sends or takes anything."""
    try:
        addons: Any = importlib.import_module("ray.util.serialization_addons")
    except ImportError:
        return
    addons.apply = lambda context: None


def _private(name: str) -> Any:
    return importlib.import_module(f"ray._private.{name}")
