"""Ray's own process on this node, and how a driver notices that it has died."""

from __future__ import annotations

import contextlib
import socket

import ray


class Raylet:
    """A connection to the raylet of this node, over which nothing is ever sent (liveness by connection).

    The kernel closes it when the raylet ends, however that ends. Ray itself notices some ten seconds later,
    and then ends the driver without a word.
    """

    def __init__(self) -> None:
        here = ray.get_runtime_context().get_node_id()
        (self._path,) = [str(node["RayletSocketName"]) for node in ray.nodes() if node["NodeID"] == here]
        self._socket = socket.socket(socket.AF_UNIX)
        self._lost = False
        try:
            self._socket.connect(self._path)
            self._socket.setblocking(False)
        except (ConnectionRefusedError, FileNotFoundError):
            self._lost = True

    def lost(self) -> bool:
        """Whether it has died."""
        if not self._lost:
            with contextlib.suppress(BlockingIOError):
                try:
                    self._lost = not self._socket.recv(1)
                except ConnectionResetError:
                    self._lost = True
        return self._lost

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
