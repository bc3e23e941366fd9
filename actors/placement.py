"""How many processes run on a cluster, and on which of its nodes: decisions alone, without Ray.

Agents get half of the cores and refiners the other half, at least one process each.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from culturepark.models.local.engine import LOOPBACK
from culturepark.settings import ActorSettings

_MAX_CORES = 32
"""More cores than this count as this many: one moderator would not keep more of them busy."""


class Node(Struct, frozen=True):
    """A node of a cluster: Ray's id for it, its address, and the CPUs it offers."""

    id: str
    ip: str
    cpus: float


def worker_counts(settings: ActorSettings, cultures: int, cpus: float) -> tuple[int, int]:
    """How many agents of each culture, and how many refiners. What is not set follows from `cpus`."""
    half = min(int(cpus), _MAX_CORES) // 2
    return settings.agents_per_culture or max(1, half // cultures), settings.refiners or max(1, half)


def engine_nodes(nodes: Sequence[Node], engines: int) -> list[Node]:
    """The nodes that serve an embedded model: `engines` of them, 0 for all that offer CPUs.

    The driver's node is the first in `nodes` and serves if no other can.
    """
    candidates = [node for node in nodes if node.cpus >= 1] or list(nodes[:1])
    return candidates[: engines or None]


def engine_host(nodes: Sequence[Node], node: Node) -> str:
    """Where a server on `node` listens: on loopback, unless other machines have to reach it."""
    return node.ip if len({one.ip for one in nodes}) > 1 else LOOPBACK
